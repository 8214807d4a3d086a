"""How compiled code gets to run: one function on all of torch's threads, which share its work out among themselves."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, from_dtype, types
from numba.extending import intrinsic
from torch import Tensor

from gossamer.kernels.layout import Array

Body = Any  # what Numba makes of a function


@intrinsic
def take(typing, at):
    """The whole number (int64) that lies there, which grows by 1 at the same moment for all threads."""

    def generate(context, build, sig, x):
        one = ir.Constant(ir.IntType(64), 1)
        return build.atomic_rmw("add", build.inttoptr(x[0], ir.IntType(64).as_pointer()), one, "monotonic")

    return types.int64(types.int64), generate


def _array_at(kind: Any) -> Any:
    """An operation that reads an address as a pointer to numbers of this kind, for carray."""

    @intrinsic
    def pointer(typing, at):
        def generate(context, build, sig, x):
            return build.inttoptr(x[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.int64), generate

    return pointer


bytes_at, int32_at, int64_at = _array_at(types.uint8), _array_at(types.int32), _array_at(types.int64)
float32_at = _array_at(types.float32)


def compiled(kind: "np.dtype[Any]", body: Callable[..., None]) -> Body:
    """body(pointer to a job), as machine code."""
    return cfunc(types.void(types.CPointer(from_dtype(kind))), error_model="numpy")(body)


@functools.cache
def _parallel() -> Any:
    """The entry to the threads that torch computes with (GNU's OpenMP and LLVM's both have it), or None: others beside
    them would be two for each core, and OpenMP's wait for one another by sleeping then."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


def run(body: Body, work: Array) -> None:
    """Runs body(work) on all of torch's threads; it has to ask `take` what is left to do."""
    threads, entry = torch.get_num_threads(), _parallel()
    if threads == 1 or entry is None:
        body.ctypes(work.ctypes.data_as(body.ctypes.argtypes[0]))
    else:
        entry(body.address, work.ctypes.data, threads, 0)


def _dense(x: Tensor) -> bool:
    """Whether the last entries lie side by side; of other numbers than places and counts the job has all steps."""
    return x.is_floating_point() or x.numel() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1


def job(kind: "np.dtype[Any]", /, **fields: int | float | Tensor | None) -> Array:
    """One job [1] of this kind, its fields in order; of a tensor the address (its owner has to keep it), 0 for None."""
    assert tuple(fields) == kind.names
    assert all(_dense(x) for x in fields.values() if isinstance(x, Tensor))
    numbers = [x if type(x) is int else x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in fields.values()]
    return np.array([tuple(numbers)], dtype=kind)
