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
