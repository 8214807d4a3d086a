"""Attention of one query per sequence over the selected pages and tokens of the cache."""

import torch
from torch import Tensor

from gossamer.kernels.cpu_gathered import attend_gathered
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.native import reads


def paged_decode(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """As paged_prefill, for blocks of one query each (blocks.size == 1)."""
    assert blocks.size == 1
    if len(blocks) == 0:
        return
    if q.is_cuda:
        from gossamer.kernels.triton.paged_decode import launch

        return launch(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap, sinks=sinks)
    if reads(kv.k, kv.k.shape[3]) and kv.k.stride() == kv.v.stride():
        from gossamer.kernels.native.paged_decode import launch as launch_on_cpu

        return launch_on_cpu(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap, sinks=sinks)
    paged_decode_torch(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap, sinks=sinks)


def paged_decode_torch(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """What paged_decode means; also how the CPU runs it where keys are FP8 or have a size that is no multiple of 16."""
    head, block = torch.ones_like(index.start).nonzero().unbind(1)
    attend_gathered(q, kv, blocks, index, head, block, out, lse, scale=scale, softcap=softcap, sinks=sinks)
