"""One row per backend: how to make its selector for a head of `dim` channels, reading everything or little."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gossamer.attention.selectors import (
    BlockSparse,
    Budget,
    DoubleSparsity,
    LearnedGate,
    Selector,
    SinkRecent,
    VerticalSlash,
)
from gossamer.kernels.rotary import Rotary
from gossamer.kvcache.summaries import GateKeys, Labels

GATE_DIM = 16
LARGE = 2**20


@dataclass(frozen=True)
class Backend:
    """`everything` and `little` make a selector for (KV heads, ratio, dim). `prompts`, `generated`: where it runs."""

    name: str
    everything: Callable[[int, int, int], Selector]
    little: Callable[[int, int, int], Selector]
    prompts: bool = True
    generated: bool = True
    exact: bool = True  # everything selected as pages gives the bits of dense; single tokens are read in another order


def labels(heads: int, dim: int, device: str = "cpu") -> Labels:
    """A quarter of the channels, others for each head."""
    channels = [[(3 * i + head) % dim for i in range(dim // 4)] for head in range(heads)]
    channels[0][-1] = -1  # one head has a channel less
    return Labels("test", tuple(map(tuple, channels)), torch.tensor(channels, dtype=torch.int32, device=device))


def gate(
    phase: str, heads: int, ratio: int, dim: int, budget: Budget, *, own_keys: bool = False, device: str = "cpu"
) -> LearnedGate:
    """A gate with random weights: one gate query per query head for prompts, one per KV head for generated tokens. Each
    gate query has its own keys, or they share them."""
    generator = torch.Generator().manual_seed(dim)
    rotary, turned = (Rotary((10000.0 ** -(torch.arange(n // 2) * 2 / n)).to(device)) for n in (dim, GATE_DIM))
    queries = 1 if phase == "decode" else ratio
    weight = torch.randn(heads, queries if own_keys else 1, 3 * dim, GATE_DIM, generator=generator) * 2 / dim**0.5
    keys = GateKeys(f"test {phase}", 0, weight.to(device), None, rotary, turned)
    query = torch.randn(heads, queries, ratio * dim, GATE_DIM, generator=generator) / dim**0.5
    norm = torch.ones(GATE_DIM, device=device) if phase == "decode" else None
    return LearnedGate(keys, budget, query.to(device), norm, phase)


ALL, SOME, MASS, PART = Budget("share", 1.0), Budget("tokens", 192), Budget("mass", 0.6), Budget("part", 1.0, least=130)

BACKENDS = (
    Backend("sink-recent", lambda g, r, d: SinkRecent(LARGE, LARGE), lambda g, r, d: SinkRecent(64, 100)),
    Backend("mean", lambda g, r, d: BlockSparse(ALL), lambda g, r, d: BlockSparse(SOME)),
    Backend("mean-mass", lambda g, r, d: BlockSparse(Budget("mass", 1.0)), lambda g, r, d: BlockSparse(MASS)),
    Backend(
        "mean-corrected",
        lambda g, r, d: BlockSparse(ALL, corrects=True),
        lambda g, r, d: BlockSparse(PART, corrects=True),
    ),
    Backend("bounds", lambda g, r, d: BlockSparse(ALL, "bounds"), lambda g, r, d: BlockSparse(SOME, "bounds")),
    Backend(
        "antidiagonal",
        lambda g, r, d: BlockSparse(ALL, "antidiagonal", 8),
        lambda g, r, d: BlockSparse(MASS, "antidiagonal", 8),
        generated=False,
    ),
    Backend(
        "columns",
        lambda g, r, d: VerticalSlash(LARGE, 0, 40),
        lambda g, r, d: VerticalSlash(20, 0, 40),
        generated=False,
        exact=False,
    ),
    Backend(
        "diagonals",
        lambda g, r, d: VerticalSlash(0, LARGE, 40),
        lambda g, r, d: VerticalSlash(3, 2, 40, mass=0.5),
        generated=False,
    ),
    Backend(
        "double-sparsity",
        lambda g, r, d: DoubleSparsity(labels(g, d), LARGE),
        lambda g, r, d: DoubleSparsity(labels(g, d), 30, mass=0.9),
        prompts=False,
        exact=False,
    ),
    Backend(
        "gate",
        lambda g, r, d: gate("prefill", g, r, d, ALL),
        lambda g, r, d: gate("prefill", g, r, d, MASS),
        generated=False,
    ),
    Backend(
        "gate-keys",
        lambda g, r, d: gate("prefill", g, r, d, ALL, own_keys=True),
        lambda g, r, d: gate("prefill", g, r, d, MASS, own_keys=True),
        generated=False,
    ),
    Backend(
        "gate-decode",
        lambda g, r, d: gate("decode", g, r, d, ALL),
        lambda g, r, d: gate("decode", g, r, d, SOME),
        prompts=False,
    ),
)
