"""Attention of single queries whose keys are scattered: copy what some of them read, then attend for these (CPU).

What to copy is worked out in numpy, whose small operations take a third of the time of torch's.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels.cpu_attention import attend_in_pieces, merge
from gossamer.kernels.cpu_gathered import padded, write_rows
from gossamer.kernels.cpu_pages import pools, read_pages, read_rows
from gossamer.kernels.layout import Array, PagedKV, QueryBlocks, SparseIndex

COPIED_BYTES = 4 << 20  # keys and values copied at once, so few that they are still in a core's cache when read


def attend_rows(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    head: Array,
    block: Array,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """As paged_decode, for the rows (head[x], block[x]) alone. Rows that read about as much are one attention."""
    for width, rows in _alike(kv, blocks, index, head, block).items():
        part = head[rows], block[rows]
        make = _even_keys if width.even else _token_keys if width.singles else _page_keys
        keys = make(kv, blocks, index, *part, width)
        heads = kv.heads.numpy()[part[0]][:, None] * kv.ratio + np.arange(kv.ratio, dtype=np.int32)
        token = blocks.token.numpy()[part[1]][:, None]
        place = torch.from_numpy(token * np.int64(q.shape[1]) + heads)  # in T * H
        packed = q.flatten(0, 1).index_select(0, place.flatten()).view(len(heads), kv.ratio, 1, -1)
        parts = []
        for some, k, v, visible, piece in keys.copies(kv, q.dtype):
            cut = attend_in_pieces(packed[some], k, v, scale=scale, softcap=softcap, visible=visible, piece=piece)
            parts.append(merge(cut))
        whole = parts[0] if len(parts) == 1 else (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
        merged, total = merge([whole], None if sinks is None else sinks[torch.from_numpy(heads)])
        write_rows(out, place, merged.squeeze(2))
        write_rows(lse, place, total.squeeze(2))


class Width(NamedTuple):
    """What rows are copied to together: pages and single tokens of each; exactly so many pages if `even`, which are all
    that the rows may see but for the end of the last one."""

    pages: int
    singles: int
    even: bool


def _alike(kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Array, block: Array) -> dict[Width, list[int]]:
    """Rows by width, which a sequence's own counts decide: its result does not depend on its neighbours. Where rows of
    one sequence that read equally many pages fill a copy they need no mask."""
    counts = index.count.numpy()[head, block].tolist()
    singles = [0] * len(counts) if index.token_count is None else index.token_count.numpy()[head, block].tolist()
    seq, pos = blocks.seq.numpy()[block], blocks.pos.numpy()[block]
    unlimited = (kv.window.numpy()[seq, head] > pos).tolist()
    same: dict[tuple[int, int, int, bool], list[int]] = {}
    for row, key in enumerate(zip(block.tolist(), counts, singles, unlimited, strict=True)):
        same.setdefault(key, []).append(row)
    found: dict[Width, list[int]] = {}
    token_bytes = 2 * kv.v.shape[3] * kv.v.element_size()
    for (_, count, tokens, free), rows in sorted(same.items()):
        if free and not tokens and len(rows) * count * kv.page_size * token_bytes >= COPIED_BYTES:
            width = Width(count, 0, True)
        else:
            width = Width(padded(count), padded(tokens) if tokens else 0, False)
        found.setdefault(width, []).extend(rows)
    return found


@dataclass(frozen=True, slots=True)
class RowKeys:
    """What some rows read: whole pages, or single tokens."""

    pages: Tensor | None  # [X, n], counted over G * P; or else
    slots: Tensor | None  # [X, n] tokens, counted over G * P * S
    width: int  # keys copied for each row
    runs: Sequence[tuple[int, int, int]]  # rows from, to, and how many of the first of their keys they may see at most
    visible: Tensor | None = None  # [X, 1, width]; None: all of these
    unwritten: Tensor | None = None  # [X, S] of the first page, which is the query's own then

    def copies(self, kv: PagedKV, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, int]]:
        """Rows, their keys and values [x, keys, D] and what is visible, as many at a time as COPIED_BYTES holds; and
        how many keys a core should take at once: all of a row's, unless so few rows would leave cores without work.
        What was given is overwritten by what comes next. Keys and values in unwritten places are 0."""
        dim, both = kv.k.shape[3], pools(kv, dtype)
        dtype = both[0].dtype
        most = max(1, COPIED_BYTES // (self.width * 2 * dim * dtype.itemsize))
        cores = -(-torch.get_num_threads() // most)  # for a row, whatever its neighbours: not by how many they are
        size = 2, min(max(last - first for first, last, _ in self.runs), most), self.width, dim
        room = torch.empty(size, dtype=dtype)  # one for all: fresh memory costs more than the copy
        for first, last, seen in self.runs:
            for low in range(first, last, most):
                some = slice(low, min(low + most, last))
                copy = room[:, : some.stop - low]
                for pool, to in zip(both, copy, strict=True):
                    if self.pages is not None:
                        read_pages(pool, self.pages[some], to)
                    elif self.slots is not None:
                        read_rows(pool, self.slots[some], to)
                if self.unwritten is not None:
                    copy[:, :, : kv.page_size].masked_fill_(self.unwritten[some, :, None], 0)
                visible = None if self.visible is None else self.visible[some]
                yield some, copy[0, :, :seen], copy[1, :, :seen], visible, max(1, seen // cores)


def _even_keys(
    kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Array, block: Array, width: Width
) -> RowKeys:
    """Of even rows, which lie sequence by sequence. The query's own page is the last."""
    seq, pos, size = blocks.seq.numpy()[block][:, None], blocks.pos.numpy()[block], kv.page_size
    at = index.start.numpy()[head, block][:, None] + np.arange(width.pages, dtype=np.int32)
    place = head[:, None] * kv.k.shape[1] + kv.table.numpy()[seq, index.pages.numpy()[at]]
    keys = width.pages * size
    edges = [0, *(np.flatnonzero(block[1:] != block[:-1]) + 1).tolist(), len(block)]
    seen = (keys - size + pos % size + 1).tolist()
    runs = [(first, last, seen[first]) for first, last in itertools.pairwise(edges)]
    return RowKeys(torch.from_numpy(place), None, keys, runs)


def _page_keys(
    kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Array, block: Array, width: Width
) -> RowKeys:
    """Of rows without single tokens. The query's own page, the last of a run, comes first; short runs repeat their
    first."""
    seq, pos, size = blocks.seq.numpy()[block], blocks.pos.numpy()[block][:, None], kv.page_size
    count, column = index.count.numpy()[head, block][:, None], np.arange(width.pages, dtype=np.int32)
    real = column < count
    turned = np.where(real, (column + count - 1) % count, 0)
    page = index.pages.numpy()[index.start.numpy()[head, block][:, None] + turned]
    token = np.arange(size, dtype=np.int32)
    unwritten = token > pos % size
    if (kv.window.numpy()[seq, head][:, None] > pos).all():
        visible = np.ones((len(head), width.pages * size), dtype=np.bool_)
        visible[:, :size] = ~unwritten
    else:
        visible = _sees(kv, seq, head, (page[..., None] * size + token).reshape(len(head), -1), pos)
    if not real.all():
        visible &= real.repeat(size, 1)
    place = torch.from_numpy(head[:, None] * kv.k.shape[1] + kv.table.numpy()[seq[:, None], page])
    shown, none = torch.from_numpy(visible)[:, None], torch.from_numpy(unwritten)
    keys = width.pages * size
    return RowKeys(place, None, keys, [(0, len(head), keys)], shown, none)


def _sees(kv: PagedKV, seq: Array, head: Array, key: Array, pos: Array) -> Array:
    """key [X, n], pos [X, 1] -> [X, n]: PagedKV's rule."""
    near = (key > pos - kv.window.numpy()[seq, head][:, None]) | (key < kv.sink.numpy()[seq, head][:, None])
    seen: Array = near & (key <= pos)
    return seen


NO_PAGE = 2**24  # lies in every query's future


def _token_keys(
    kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Array, block: Array, width: Width
) -> RowKeys:
    """Of rows with single tokens. Places that a row may not see hold its own key."""
    seq, pos = blocks.seq.numpy()[block], blocks.pos.numpy()[block][:, None]
    page = _run(index.pages, index.start, index.count, head, block, width.pages, NO_PAGE)
    key = (page[..., None] * kv.page_size + np.arange(kv.page_size, dtype=np.int32)).reshape(len(head), -1)
    assert index.tokens is not None and index.token_start is not None and index.token_count is not None
    behind = NO_PAGE * kv.page_size
    single = _run(index.tokens, index.token_start, index.token_count, head, block, width.singles, behind)
    key = np.concatenate((key, single), 1)
    visible = _sees(kv, seq, head, key, pos)
    key = np.where(visible, key, pos)
    physical = kv.table.numpy()[seq[:, None], key // kv.page_size]
    slot = torch.from_numpy((head[:, None] * kv.k.shape[1] + physical) * kv.page_size + key % kv.page_size)
    shown, keys = torch.from_numpy(visible)[:, None], key.shape[1]
    return RowKeys(None, slot, keys, [(0, len(head), keys)], shown)


def _run(values: Tensor, start: Tensor, count: Tensor, head: Array, block: Array, width: int, fill: int) -> Array:
    """[X, width]: values[start[x] : start[x] + count[x]], then `fill`."""
    column = np.arange(width, dtype=np.int32)
    at = np.minimum(start.numpy()[head, block][:, None] + column, values.numel() - 1)
    return np.where(column < count.numpy()[head, block][:, None], values.numpy()[at], np.int32(fill))
