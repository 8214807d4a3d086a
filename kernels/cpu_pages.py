"""Reading the cache on a CPU: in place where pages lie side by side, by copy where they do not."""

import torch
from torch import Tensor

from gossamer.kernels.layout import PagedKV


def read_span(
    kv: PagedKV, seq: int, heads: slice, begin: int, end: int, *, shortest: int
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the positions begin ... end - 1 of one sequence, each [heads, tokens, D], in pieces.

    Stretches of at least `shortest` tokens whose pages are physical neighbours are views of the cache; all others are
    copied into one piece. The pieces together hold every position once; only the first and last may be ragged.
    """
    if begin >= end:
        return []
    size = kv.page_size
    first = begin // size
    physical = kv.table[seq, first : (end - 1) // size + 1]
    breaks = (physical[1:] - physical[:-1] != 1).nonzero().flatten().tolist()
    edges = [0, *(at + 1 for at in breaks), physical.numel()]
    host = physical[edges[:-1]].tolist()
    pieces = []
    scattered: list[tuple[int, int]] = []
    for where, low, high in zip(host, edges[:-1], edges[1:], strict=True):
        assert where >= 0, "the index names a released page"
        start, stop = max(begin, (first + low) * size), min(end, (first + high) * size)
        if stop - start >= shortest or len(host) == 1:
            offset = start - (first + low) * size
            slot = where * size + offset
            pieces.append((in_place(kv.k, heads, slot, stop - start), in_place(kv.v, heads, slot, stop - start)))
        else:
            scattered.append((low, high))
    if scattered:
        chosen = torch.cat([physical[low:high] for low, high in scattered])
        low = max(begin - (first + scattered[0][0]) * size, 0)
        high = chosen.numel() * size - max((first + scattered[-1][1]) * size - end, 0)
        k, v = (pool[heads].index_select(1, chosen).flatten(1, 2)[:, low:high] for pool in (kv.k, kv.v))
        pieces.append((k, v))
    return pieces


def in_place(pool: Tensor, heads: slice, slot: int, tokens: int) -> Tensor:
    """pool [G, P, S, D] -> [heads, tokens, D] from row `slot` of each head's P * S rows on; a view where a head's
    pages are contiguous, as the cache makes them."""
    size, (head, page, row, _) = pool.shape[2], pool.stride()
    if page == size * row:
        shape = (heads.stop - heads.start, tokens, pool.shape[3])
        return pool.as_strided(shape, (head, row, 1), pool.storage_offset() + heads.start * head + slot * row)
    first, last = slot // size, (slot + tokens - 1) // size
    return pool[heads, first : last + 1].flatten(1, 2)[:, slot - first * size :][:, :tokens]


def read_rows(pool: Tensor, slot: Tensor, to: Tensor | None = None) -> Tensor:
    """pool [G, P, S, D], slot [X, n], counted over G * P * S -> a copy [X, n, D] of single rows, in `to` if given."""
    if not pool.is_contiguous():
        page, size = slot // pool.shape[2], pool.shape[1]
        copy = pool[page // size, page % size, slot % pool.shape[2]]
        return copy if to is None else to.copy_(copy)
    rows = pool.view(-1, pool.shape[3])
    if to is None:
        return rows.index_select(0, slot.flatten()).view(*slot.shape, -1)
    torch.index_select(rows, 0, slot.flatten(), out=to.view(slot.numel(), -1))
    return to


def read_pages(pool: Tensor, head: Tensor, physical: Tensor, to: Tensor | None = None) -> Tensor:
    """pool [G, P, S, D], head [X], physical [X, c] -> a copy [X, c * S, D] of those pages, in `to` if given."""
    rows, (_, pages, size, dim) = len(physical), pool.shape
    if not pool.is_contiguous():
        copy = pool[head[:, None], physical].flatten(1, 2)
        return copy if to is None else to.copy_(copy)
    at = (head[:, None] * pages + physical).flatten()
    if to is None:
        return pool.flatten(0, 1).index_select(0, at).view(rows, -1, dim)
    torch.index_select(pool.view(-1, size * dim), 0, at, out=to.view(len(at), size * dim))
    return to
