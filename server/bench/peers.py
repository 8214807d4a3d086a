"""Others' attention, which finds keys and values side by side already: torch's, and flash-attn's where installed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.kernels.flash_attention import side_by_side

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """q [B, H, T, D], k and v [B, G, length, D]"""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def torchs(call: Callable[[], Tensor], device: str, refused: Callable[[str], None]) -> dict[str, Callable[[], Tensor]]:
    """The call under each of torch's back ends that takes it; on a CPU torch chooses. `refused` hears of the others."""
    if device == "cpu":
        return {"torch": call}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, backend in BACKENDS.items():

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return call()

        if _takes(name, run, refused):
            calls[name] = run
    return calls


def flash_attns(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, refused: Callable[[str], None]
) -> dict[str, Callable[[], Tensor]]:
    """As sdpa, with the scale that is usual, under each flash-attn package that is installed and takes it."""
    across = [x.transpose(1, 2) for x in (q, k, v)]
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, attention in side_by_side().items() if q.is_cuda else ():
        run = partial(attention, *across, causal=causal)
        if _takes(name, run, refused):
            calls[name] = run
    return calls


def _takes(name: str, run: Callable[[], object], refused: Callable[[str], None]) -> bool:
    """Whether it runs on what it was given; otherwise why not."""
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as reason:
        refused(f"{name} does not take it: {str(reason).splitlines()[0]}")
        return False
    return True
