"""How much of a query block's attention each past page would get, judged by what side tables hold of the page.

Past pages of block n are the logical pages l < origin[n] // S that are resident: full, hence summarised. The mass of a
block is, for each row (one query of one head), a softmax in float32 over the logits of the past pages; its mean over
the block's queries; the maximum over the heads of the group; divided by its sum. It adds up to 1, is 0 for pages that
are not past, and all 0 where a block has no past page.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gossamer.kernels.layout import NULL_PAGE, PagedKV, QueryBlocks


def page_mass(q: Tensor, kv: PagedKV, blocks: QueryBlocks, keys: Tensor, *, scale: float) -> Tensor:
    """Mass by one key per page, its mean or a gate's: logit = scale * q . key.

    q [T, H, d], keys [G, P, d] (any strides, unit in d) -> [G, N, L] float32.
    """
    if q.is_cuda:
        from gossamer.kernels.triton.score_pages import launch

        return launch(q, kv, blocks, keys, scale=scale)
    return page_mass_torch(q, kv, blocks, keys, scale=scale)


def bound_mass(q: Tensor, kv: PagedKV, blocks: QueryBlocks, bounds: Tensor, *, scale: float) -> Tensor:
    """Mass by the largest product that the bounds of a page's keys allow: for each of the page's c stretches of tokens
    sum_d max(q_d * minimum_d, q_d * maximum_d), the maximum over the stretches, times scale.

    q [T, H, D], bounds [G, P, c, 2, D], minimum first (any strides, unit in D) -> [G, N, L] float32.
    """
    if q.is_cuda:
        from gossamer.kernels.triton.score_pages import launch_bounds

        return launch_bounds(q, kv, blocks, bounds, scale=scale)
    return bound_mass_torch(q, kv, blocks, bounds, scale=scale)


def page_mass_torch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, keys: Tensor, *, scale: float) -> Tensor:
    """What page_mass means; also how the CPU runs it."""
    return mass_torch(q, kv, blocks, _PageKeys(keys), scale=scale)


def bound_mass_torch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, bounds: Tensor, *, scale: float) -> Tensor:
    """What bound_mass means; also how the CPU runs it."""
    return mass_torch(q, kv, blocks, _Bounds(bounds), scale=scale)


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


@dataclass(frozen=True, slots=True)
class _PageKeys:
    table: Tensor  # [G, P, d]

    @property
    def per_page(self) -> int:
        return 1

    def keys(self, own: slice, known: Tensor) -> Tensor:
        return known.float()[:, None]

    def queries(self, own: slice, q: Tensor) -> Tensor:
        return q


@dataclass(frozen=True, slots=True)
class _Bounds:
    table: Tensor  # [G, P, c, 2, D]

    @property
    def per_page(self) -> int:
        return 1

    def keys(self, own: slice, known: Tensor) -> Tensor:
        return known.flatten(3).transpose(1, 2).float()

    def queries(self, own: slice, q: Tensor) -> Tensor:
        # The minimum counts where q is negative, the maximum where it is positive: one product of twice the length.
        return torch.cat((q.clamp_max(0), q.clamp_min(0)), -1)


PART = 2**21  # logits computed at a time, more only where one query's do not fit
GATHERED = 2**20  # floats of keys held at a time, more only where one head's of one sequence do not fit
PASSING = 2**19  # ... where they are used only once, so that they are still in the cache


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
        table = kv.table[first.seq, : width // each]
        resident = (table != NULL_PAGE).repeat_interleave(each)
        logits = kv.ratio * width * max(blocks.rows[run.start].count for run in runs)  # of one tile and KV head
        once = all(blocks.rows[run.start].count * (run.stop - run.start) == 1 for run in runs) and len(runs) == 1
        floats = columns.table[0, 0].numel() * len(table)
        heads = groups if once else max(1, min(groups, GATHERED // floats, PART // logits))
        for low in range(0, groups, heads):
            own = slice(low, min(low + heads, groups))
            keys: Iterable[Tensor] = _keys(columns, own, table, PASSING if once else floats * heads)
            keys = keys if once else [*keys]
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
    heads = (kv.heads[own, None] * ratio + torch.arange(ratio)).flatten()
    rows = q[first.token : first.token + tiles * first.count].index_select(1, heads).float()
    return rows.view(tiles, first.count, -1, ratio, q.shape[2]).permute(2, 0, 1, 3, 4)


def _keys(columns: Columns, own: slice, pages: Tensor, floats: int) -> Iterator[Tensor]:
    """The keys of a sequence's pages for the heads `own`, as many pages at a time as have `floats`."""
    table, physical = columns.table[own], pages.clamp_min(0)
    step = max(1, floats // (table.shape[0] * table[0, 0].numel()))
    together = bool((physical[1:] - physical[:-1] == 1).all())
    for low in range(0, len(pages), step):
        some = physical[low : low + step]
        first = int(some[0])
        yield columns.keys(own, table[:, first : first + len(some)] if together else table.index_select(1, some))


def _mean_shares(rows: Tensor, keys: Iterable[Tensor], past: Tensor, columns: Columns, own: slice) -> Tensor:
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
        logits = _logits(queries, keys, width).view(heads, tiles, -1, width)
        logits[..., cut:].masked_fill_(hidden[:, None, cut:], -torch.inf)
        total += logits.softmax(-1).unflatten(2, (-1, ratio)).sum(2)
    return total.div_(count)


def _logits(queries: Tensor, keys: Iterable[Tensor], width: int) -> Tensor:
    """queries [X, rows, e], keys [X, c, C, e] in pieces of C -> [X, rows, width], the largest of each column's c."""
    parts: list[Tensor] = []
    for piece in keys:
        piece = piece[:, :, : width - sum(part.shape[2] for part in parts)]
        part = torch.bmm(queries, piece[:, 0].mT)
        for c in range(1, piece.shape[1]):
            torch.maximum(part, torch.bmm(queries, piece[:, c].mT), out=part)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
