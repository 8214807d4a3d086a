"""Queries as kernels want them: four side by side in float32. In compiled code."""

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from gossamer.kernels.native.lanes import LANES, SIZES, load, load_of, multiply, splat, store
from gossamer.kernels.native.tile import FOUR

KINDS = tuple(SIZES)  # by number, where the dtype is only known when it runs
_load_float16, _load_bfloat16 = load_of("float16"), load_of("bfloat16")


def kind_of(numbers: Tensor) -> str:
    """The dtype's name."""
    return str(numbers.dtype).removeprefix("torch.")


def rows_of(numbers: Tensor) -> tuple[int, int, int]:
    """[T, H, ...] -> the dtype's number, bytes from a token to the next, and from a head to the next."""
    assert numbers.dim() == 2 or numbers.stride(-1) == 1
    token, head = numbers.stride()[:2]
    size = numbers.element_size()
    return KINDS.index(kind_of(numbers)), token * size, head * size


@njit(error_model="numpy")
def read_queries(to: Any, at: Any, kind: Any, step: Any, real: Any, dim: Any, scale: Any) -> None:
    """to: address of [4, dim] float32; at: of the first query, `step` bytes from one to the next, of which `real` are
    there: these times the scale, and zeros."""
    factor = splat(np.float32(scale))
    for r in range(FOUR):
        for j in range(0, dim, LANES):
            own, query = to + 4 * (r * dim + j), at + r * step
            if r >= real:
                store(own, splat(np.float32(0)))
            elif kind == 0:
                store(own, multiply(load(query + 4 * j), factor))
            elif kind == 1:
                store(own, multiply(_load_float16(query + 2 * j), factor))
            else:
                store(own, multiply(_load_bfloat16(query + 2 * j), factor))
