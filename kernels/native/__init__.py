"""Kernels for CPUs, which Numba compiles when they first run."""

import functools
import importlib.util

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def compiles() -> bool:
    """Whether there are any; if not, torch's twins run in their place."""
    return importlib.util.find_spec("numba") is not None


def reads(table: Tensor, *channels: int) -> bool:
    """Whether they can read a table [G, P, ...], whose rows have so many numbers."""
    even = all(number % 16 == 0 for number in channels)
    return compiles() and table.dtype in _DTYPES and even and table[0, 0].is_contiguous()


def compile_all(dtype: torch.dtype) -> None:
    """Now, for keys and summaries of that dtype, rather than when the first request comes."""
    if not compiles() or dtype not in _DTYPES:
        return
    from gossamer.kernels.native import choose, paged_decode, runs, scores

    kind = str(dtype).removeprefix("torch.")
    paged_decode.attend_pieces(kind)
    paged_decode.join_pieces()
    scores.score(kind)
    choose.choose_pages()
    choose.choose_tokens()
    runs.list_runs()
