"""How the attention kernels load a page of keys or values: by pointers, or by a tensor descriptor, which leaves the
addresses and the copying to the copy engine of Hopper and later GPUs (TMA)."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer.kernels.layout import PagedKV
from gossamer.kernels.triton.tiles import load_rows

ALIGNMENT = 16  # bytes, of what a descriptor begins at and steps by (CUDA driver API, cuTensorMapEncodeTiled)


def descriptors_fit(kv: PagedKV, capability: int) -> bool:
    """Whether the pages can be read through descriptors: on a GPU that has the engine, and where every head, page and
    row begins at a multiple of 16 bytes. Not float32: its tiles have no registers to spare."""
    item = kv.k.element_size()
    places = [pool.data_ptr() for pool in (kv.k, kv.v)]
    steps = [item * step for pool in (kv.k, kv.v) for step in pool.stride()[:3]]
    return capability >= 90 and item == 2 and all(place % ALIGNMENT == 0 for place in (*places, *steps))


def page_descriptors(kv: PagedKV, wide: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of keys and values [G, P, S, D]: a load is one page of one head, with zeros behind D up to `wide`. Heads and
    pages are coordinates of their own, so no number passes 32 bits however large the pool is."""

    def of(pool: Tensor) -> TensorDescriptor:
        return TensorDescriptor(pool, list(pool.shape), list(pool.stride()), [1, 1, pool.shape[2], wide])

    return of(kv.k), of(kv.v)


@triton.jit
def load_page(
    pages, ptr, head, physical, page_stride, row_stride, there,
    ROWS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows [PAGE, WIDE] of a head's page `physical` (int64), by the descriptor `pages` when TMA, otherwise from `ptr`,
    where the head begins; zero where not `there` [PAGE] (when ROWS) and behind DIM."""
    if TMA:
        rows = pages.load([head, physical.to(tl.int32), 0, 0]).reshape(PAGE, WIDE)
        if ROWS:
            rows = tl.where(there[:, None], rows, 0.0)
        return rows
    at = tl.arange(0, PAGE) * row_stride
    return load_rows(ptr + physical * page_stride, at, there, ROWS, DIM, WIDE)
