"""Write a step's new keys and values into their pages."""

import torch
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks


def store(k: Tensor, v: Tensor, kv: PagedKV, blocks: QueryBlocks) -> None:
    """Copy the keys and values of the tokens in `blocks` to the pages that the table gives their positions.

    k, v [T, heads of the layer, D], any strides with unit stride in D; kv.heads says which of them are taken. Every
    page that a token falls into must be resident (not NULL_PAGE). Writes kv.k and kv.v; nothing else in them changes.
    """
    if len(blocks) == 0:
        return
    if k.is_cuda:
        from gossamer.kernels.triton.store import launch

        return launch(k, v, kv, blocks)
    store_torch(k, v, kv, blocks)


def store_torch(k: Tensor, v: Tensor, kv: PagedKV, blocks: QueryBlocks) -> None:
    """What store means; also how the CPU runs it: neighbouring tiles become one copy."""
    size = kv.page_size
    count = blocks.count.long()
    first = (count.cumsum(0) - count).repeat_interleave(count)
    within = torch.arange(int(first.numel())) - first
    token = blocks.token.long().repeat_interleave(count) + within
    position = blocks.pos.long().repeat_interleave(count) + within
    seq = blocks.seq.long().repeat_interleave(count)
    page = kv.table[seq, position // size].long()
    assert bool((page >= 0).all()), "a new token falls into a page that was released"
    slot, heads = page * size + position % size, kv.heads.long()
    for new, pool in ((k, kv.k), (v, kv.v)):
        pool.flatten(1, 2)[:, slot] = new[token[:, None], heads].transpose(0, 1).to(pool.dtype)
