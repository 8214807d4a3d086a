"""Scores of past columns (pages or tokens) by what side tables hold of them, and the mass they make: for the CPU."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.kernels.layout import NULL_PAGE, PagedKV, QueryBlocks


class Columns(Protocol):
    """What is scored. The logit of a column, a page or a token, is the largest of its c products with a query."""

    @property
    def per_page(self) -> int:
        """Columns in a page."""
        ...

    @property
    def table(self) -> Tensor:
        """What is known of each page [G, P, ...]."""
        ...

    def keys(self, own: slice, known: Tensor) -> Tensor:
        """What is known of some pages, for these heads [X, pages, ...] -> their keys [X, c, columns, e] in float32."""
        ...

    def queries(self, own: slice, q: Tensor) -> Tensor:
        """q [X, rows, d] float32 of the same heads -> [X, rows, e], to be multiplied with the keys."""
        ...


PART = 2**21  # logits computed at a time, more only where one query's do not fit
GATHERED = 2**20  # floats of keys held at a time, more only where one head's of one sequence do not fit


def mass_torch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, columns: Columns, *, scale: float) -> Tensor:
    """The mass of each past column -> [G, N, L * columns.per_page] float32."""
    groups, each = kv.heads.numel(), columns.per_page
    mass = torch.zeros(groups, len(blocks), kv.table.shape[1] * each)
    limit = blocks.origin // kv.page_size * each  # [N]: columns from here on are not past
    ends = limit.tolist()
    for runs in _sequences(blocks):
        first, width = blocks.rows[runs[0].start], max(ends[runs[0].start : runs[-1].stop])
        if width == 0:
            continue
        table = kv.table.numpy()[first.seq, : width // each]
        resident = torch.from_numpy((table != NULL_PAGE).repeat(each))
        logits = kv.ratio * width * max(blocks.rows[run.start].count for run in runs)  # of one tile and KV head
        floats = columns.table[0, 0].numel() * len(table)
        heads = max(1, min(groups, GATHERED // floats, PART // logits))
        for low in range(0, groups, heads):
            own = slice(low, min(low + heads, groups))
            keys = [*_keys(columns, own, table, floats * heads)]
            for part in _parts(runs, heads * logits):
                end = max(ends[part])
                if end == 0:
                    continue
                past = (torch.arange(end) < limit[part, None]) & resident[:end]
                shares = _mean_shares(_rows(q, kv, blocks, part, own) * scale, keys, past, columns, own)
                shares = shares.amax(2)
                shares /= shares.sum(-1, keepdim=True)  # 0 / 0 where nothing is past
                mass[own, part, :end] = shares.masked_fill_(~past, 0.0)
    return mass


def _sequences(blocks: QueryBlocks) -> Iterator[list[slice]]:
    """For each stretch of tiles that belong to one sequence, the runs it consists of: tiles side by side in q with
    equally many queries."""
    rows, first, runs = blocks.rows, 0, list[slice]()
    for n in range(1, len(rows) + 1):
        before, after = rows[n - 1], rows[n] if n < len(rows) else None
        same = after is not None and after.seq == before.seq
        if after is None or not same or not after.count == before.count == after.token - before.token:
            runs.append(slice(first, n))
            first = n
        if not same:
            yield runs
            runs = []


def _parts(runs: list[slice], logits: int) -> Iterator[slice]:
    """The runs, cut to as many tiles as fit into PART when each has so many `logits`."""
    tiles = max(1, PART // logits)
    for run in runs:
        for first in range(run.start, run.stop, tiles):
            yield slice(first, min(first + tiles, run.stop))


def _rows(q: Tensor, kv: PagedKV, blocks: QueryBlocks, part: slice, own: slice) -> Tensor:
    """The queries of a run's tiles, for the heads `own` -> [X, n, count, ratio, d] float32."""
    first, tiles, ratio = blocks.rows[part.start], part.stop - part.start, kv.ratio
    rows = q[first.token : first.token + tiles * first.count].index_select(1, _heads(kv, own)).float()
    return rows.view(tiles, first.count, -1, ratio, q.shape[2]).permute(2, 0, 1, 3, 4)


def _heads(kv: PagedKV, own: slice) -> Tensor:
    """The query heads that read the KV heads `own`."""
    return (kv.heads[own, None] * kv.ratio + torch.arange(kv.ratio)).flatten()


def _keys(columns: Columns, own: slice, pages: NDArray[np.int32], floats: int) -> Iterator[Tensor]:
    """The keys of a sequence's pages for the heads `own`, as many pages at a time as have `floats`; pages
    that lie side by side are not copied first."""
    table, physical = columns.table[own], np.maximum(pages, 0)
    step = max(1, floats // table[:, 0].numel())
    for low in range(0, len(physical), step):
        part = physical[low : low + step]
        if part[-1] - part[0] == len(part) - 1 and (part[1:] > part[:-1]).all():
            yield columns.keys(own, table[:, part[0] : part[-1] + 1])
        else:
            yield columns.keys(own, table.index_select(1, torch.from_numpy(part)))


def _mean_shares(rows: Tensor, keys: Sequence[Tensor], past: Tensor, columns: Columns, own: slice) -> Tensor:
    """rows [X, n, count, ratio, d], keys [X, c, C, e] in pieces of C, past [n, C] -> softmax over the past columns,
    mean over the count [X, n, ratio, C]; NaN where a tile has no past column."""
    (heads, tiles, count, ratio, _), width = rows.shape, past.shape[1]
    hidden = ~past
    some = hidden.any(0).nonzero()
    cut = int(some[0]) if some.numel() else width  # before it, everything is past for all tiles
    total = torch.zeros(heads, tiles, ratio, width)
    step = max(1, PART // (heads * tiles * ratio * width))
    for low in range(0, count, step):
        queries = columns.queries(own, rows[:, :, low : low + step].flatten(1, 3))
        parts = [_products(queries, piece) for piece in keys]
        logits = (parts[0] if len(parts) == 1 else torch.cat(parts, 2))[:, :, :width].view(heads, tiles, -1, width)
        logits[..., cut:].masked_fill_(hidden[:, None, cut:], -torch.inf)
        total += logits.softmax(-1).unflatten(2, (-1, ratio)).sum(2)
    return total.div_(count)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """queries [X, rows, e], keys [X, c, C, e] -> [X, rows, C], the largest of each column's c."""
    found = torch.bmm(queries, keys[:, 0].mT)
    for c in range(1, keys.shape[1]):
        torch.maximum(found, torch.bmm(queries, keys[:, c].mT), out=found)
    return found
