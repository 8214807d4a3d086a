"""Write a step's new keys and values into their pages."""

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels.fp8 import quantise
from gossamer.kernels.layout import PagedKV, QueryBlocks


def store(k: Tensor, v: Tensor, kv: PagedKV, blocks: QueryBlocks) -> None:
    """Copy the keys and values of the tokens in `blocks` to the pages that the table gives their positions.

    k, v [T, heads of the layer, D], any strides with unit stride in D; kv.heads says which of them are taken. Every
    page that a token falls into must be resident (not NULL_PAGE). Writes kv.k, kv.v and, where there are scales, these
    (fp8.quantise); nothing else in them changes.
    """
    if len(blocks) == 0:
        return
    if k.is_cuda:
        from gossamer.kernels.triton.store import launch

        return launch(k, v, kv, blocks)
    store_torch(k, v, kv, blocks)


def store_torch(k: Tensor, v: Tensor, kv: PagedKV, blocks: QueryBlocks) -> None:
    """What store means; also how the CPU runs it: neighbouring tiles become one copy. Places are found in numpy, whose
    small operations take a third of the time of torch's."""
    size = kv.page_size
    count = blocks.count.numpy().astype(np.int64)
    first = (count.cumsum() - count).repeat(count)
    within = np.arange(first.size) - first
    token = torch.from_numpy(blocks.token.numpy().repeat(count) + within)
    position = blocks.pos.numpy().repeat(count) + within
    page = kv.table.numpy()[blocks.seq.numpy().repeat(count), position // size].astype(np.int64)
    assert (page >= 0).all(), "a new token falls into a page that was released"
    slot, heads = torch.from_numpy(page * size + position % size), kv.heads.long()
    for i, (new, pool) in enumerate(((k, kv.k), (v, kv.v))):
        taken = new.index_select(0, token).index_select(1, heads).transpose(0, 1)  # [G, n, D]
        if kv.scale is None:
            pool.flatten(1, 2).index_copy_(1, slot, taken.to(pool.dtype))
        else:
            stored, scale = quantise(taken)
            pool.view(torch.uint8).flatten(1, 2)[:, slot] = stored.view(torch.uint8)
            kv.scale[i].flatten(1, 2)[:, slot] = scale
