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
            pieces.append(tuple(_in_place(pool[heads], where, high - low, offset, stop - start) for pool in (kv.k, kv.v)))
        else:
            scattered.append((low, high))
    if scattered:
        chosen = torch.cat([physical[low:high] for low, high in scattered])
        low = max(begin - (first + scattered[0][0]) * size, 0)
        high = chosen.numel() * size - max((first + scattered[-1][1]) * size - end, 0)
        pieces.append(tuple(pool[heads].index_select(1, chosen).flatten(1, 2)[:, low:high] for pool in (kv.k, kv.v)))
    return [(k, v) for k, v in pieces]


def _in_place(pool: Tensor, first: int, pages: int, offset: int, tokens: int) -> Tensor:
    """pool [g, P, S, D] -> [g, tokens, D]; no copy where a head's pages are contiguous, as the cache makes them."""
    return pool[:, first : first + pages].flatten(1, 2)[:, offset : offset + tokens]


def read_pages(pool: Tensor, head: Tensor, physical: Tensor) -> Tensor:
    """pool [G, P, S, D], head [X], physical [X, c] -> a copy [X, c * S, D] of those pages."""
    if pool.is_contiguous():
        flat = pool.flatten(0, 1).index_select(0, (head[:, None] * pool.shape[1] + physical).flatten())
        return flat.view(physical.shape[0], -1, pool.shape[3])
    return pool[head[:, None], physical].flatten(1, 2)


def read_tokens(pool: Tensor, head: Tensor, physical: Tensor, offset: Tensor) -> Tensor:
    """pool [G, P, S, D], head [X], physical and offset [X, t] -> a copy [X, t, D] of single rows of pages."""
    if pool.is_contiguous():
        slot = ((head[:, None] * pool.shape[1] + physical) * pool.shape[2] + offset).flatten()
        return pool.flatten(0, 2).index_select(0, slot).view(*physical.shape, -1)
    return pool[head[:, None], physical, offset]
