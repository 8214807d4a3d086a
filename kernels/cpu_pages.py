"""Reading the cache on a CPU: in place where pages lie side by side, by copy where they do not."""

from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels.fp8 import dequantise
from gossamer.kernels.layout import PagedKV


class Pool(NamedTuple):
    """Keys or values of a view, and how they are read."""

    stored: Tensor  # [G, P, S, D]
    scale: Tensor | None  # [G, P, S]
    dtype: torch.dtype  # of what is read: as stored, or what FP8 is widened to

    @property
    def bytes(self) -> Tensor:
        """What is stored, in a type that every operation of torch knows."""
        return self.stored if self.scale is None else self.stored.view(torch.uint8)

    def widened(self, stored: Tensor, scale: Tensor) -> Tensor:
        """Some of the bytes [..., D] and their scales [...] as numbers."""
        return dequantise(stored, scale, self.dtype)


def pools(kv: PagedKV, dtype: torch.dtype) -> tuple[Pool, Pool]:
    """Keys and values; FP8 is read as `dtype`."""
    if kv.scale is None:
        return Pool(kv.k, None, kv.k.dtype), Pool(kv.v, None, kv.v.dtype)
    return Pool(kv.k, kv.scale[0], dtype), Pool(kv.v, kv.scale[1], dtype)


def read_span(
    kv: PagedKV, seq: int, heads: slice, begin: int, end: int, *, shortest: int, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the positions begin ... end - 1 of one sequence, each [heads, tokens, D], in pieces; `dtype`
    as for `pools`.

    Stretches of at least `shortest` tokens whose pages are physical neighbours are views of the cache, or copies where
    it is FP8; all others are copied into one piece. The pieces together hold every position once; only the first and
    last may be ragged.
    """
    if begin >= end:
        return []
    size, both = kv.page_size, pools(kv, dtype)
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
            k, v = (in_place(pool, heads, where * size + offset, stop - start) for pool in both)
            pieces.append((k, v))
        else:
            scattered.append((low, high))
    if scattered:
        chosen = torch.cat([physical[low:high] for low, high in scattered])
        low = max(begin - (first + scattered[0][0]) * size, 0)
        high = chosen.numel() * size - max((first + scattered[-1][1]) * size - end, 0)
        k, v = (_chosen(pool, heads, chosen)[:, low:high] for pool in both)
        pieces.append((k, v))
    return pieces


def _chosen(pool: Pool, heads: slice, physical: Tensor) -> Tensor:
    """A copy [heads, n * S, D] of some pages."""
    copy = pool.bytes[heads].index_select(1, physical).flatten(1, 2)
    if pool.scale is None:
        return copy
    return pool.widened(copy, pool.scale[heads].index_select(1, physical).flatten(1, 2))


def in_place(pool: Pool, heads: slice, slot: int, tokens: int) -> Tensor:
    """[heads, tokens, D] from row `slot` of each head's P * S rows on; a view where a head's pages are contiguous, as
    the cache makes them, and a copy where it is FP8."""
    rows = _side_by_side(pool.stored, heads, slot, tokens)
    if pool.scale is None:
        return rows
    return pool.widened(rows, _side_by_side(pool.scale[..., None], heads, slot, tokens)[..., 0])


def _side_by_side(table: Tensor, heads: slice, slot: int, tokens: int) -> Tensor:
    """table [G, P, S, D]"""
    size, (head, page, row, _) = table.shape[2], table.stride()
    if page == size * row:
        shape = (heads.stop - heads.start, tokens, table.shape[3])
        return table.as_strided(shape, (head, row, 1), table.storage_offset() + heads.start * head + slot * row)
    first, last = slot // size, (slot + tokens - 1) // size
    return table[heads, first : last + 1].flatten(1, 2)[:, slot - first * size :][:, :tokens]


def read_rows(pool: Pool, slot: Tensor) -> Tensor:
    """slot [X, n], counted over G * P * S -> a copy [X, n, D] of single rows."""
    if pool.scale is None:
        return _rows(pool.stored, slot)
    return pool.widened(_rows(pool.bytes, slot), _rows(pool.scale[..., None], slot)[..., 0])


def _rows(table: Tensor, slot: Tensor) -> Tensor:
    """table [G, P, S, D]"""
    _, pages, size, dim = table.shape
    if table.is_contiguous():
        return _taken(table.view(-1, dim), slot, dim)
    page = slot // size
    return table[page // pages, page % pages, slot % size]


def read_pages(pool: Pool, place: Tensor) -> Tensor:
    """place [X, c], counted over G * P -> a copy [X, c * S, D] of those pages."""
    if pool.scale is None:
        return _pages(pool.stored, place)
    return pool.widened(_pages(pool.bytes, place), _pages(pool.scale[..., None], place)[..., 0])


def _pages(table: Tensor, place: Tensor) -> Tensor:
    """table [G, P, S, D]"""
    _, pages, size, dim = table.shape
    if table.is_contiguous():
        return _taken(table.view(-1, size * dim), place, dim)
    return table[place // pages, place % pages].flatten(1, 2)


def _taken(rows: Tensor, place: Tensor, dim: int) -> Tensor:
    """rows [R, w], place [X, c] -> a copy of these rows [X, c * w / dim, dim]."""
    return rows.index_select(0, place.flatten()).view(len(place), -1, dim)
