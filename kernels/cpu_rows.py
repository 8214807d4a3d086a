"""Attention of single queries whose keys are scattered: copy what some of them read, then attend for these (CPU).

What to copy is worked out in numpy, whose small operations take a third of the time of torch's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.kernels.cpu_attention import attend_in_pieces, merge
from gossamer.kernels.cpu_gathered import padded
from gossamer.kernels.cpu_pages import pools, read_pages, read_rows
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex

Array = NDArray[Any]

COPIED_BYTES = 4 << 20  # keys and values copied at once, so few that they are still in a core's cache when read


def attend_rows(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    head: Tensor,
    block: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """As paged_decode, for the rows (head[x], block[x]) alone. Rows that read about as much are one attention."""
    every = head.numpy(), block.numpy()
    counts = index.count.numpy()[every].tolist()
    tokens = [0] * len(counts) if index.token_count is None else index.token_count.numpy()[every].tolist()
    for (pages, singles), rows in _alike(counts, tokens).items():
        part = every if len(rows) == len(counts) else (every[0][rows], every[1][rows])
        if singles:
            keys = _token_keys(kv, blocks, index, *part, pages, singles)
        else:
            keys = _page_keys(kv, blocks, index, *part, pages)
        heads = torch.from_numpy(kv.heads.numpy()[part[0]][:, None] * kv.ratio + np.arange(kv.ratio))
        place = (torch.from_numpy(blocks.token.numpy()[part[1]].astype(np.int64))[:, None], heads)
        packed = q[place].unsqueeze(2)
        parts = []
        for some, k, v, visible, piece in keys.copies(kv, q.dtype):
            cut = attend_in_pieces(packed[some], k, v, scale=scale, softcap=softcap, visible=visible, piece=piece)
            parts.append(merge(cut))
        whole = parts[0] if len(parts) == 1 else (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
        merged, total = merge([whole], None if sinks is None else sinks[heads])
        out[place], lse[place] = merged.squeeze(2).to(out.dtype), total.squeeze(2)


def _alike(counts: Sequence[int], tokens: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Rows that read about as many pages and single tokens, by the widths to pad to, which a row's own counts decide:
    its result does not depend on its neighbours."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, (count, singles) in enumerate(zip(counts, tokens, strict=True)):
        found.setdefault((padded(count), padded(singles) if singles else 0), []).append(row)
    return found


@dataclass(frozen=True, slots=True)
class RowKeys:
    """What some rows read: whole pages, or single tokens."""

    head: Tensor  # [X]
    pages: Tensor | None  # [X, n] physical pages, the query's own first; or else
    slots: Tensor | None  # [X, n] tokens, counted over G * P * S
    visible: Tensor  # [X, 1, keys]
    unwritten: Tensor | None  # [X, S] of the query's own page; None where a row says what it reads token by token

    def copies(self, kv: PagedKV, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, int]]:
        """Rows, their keys and values [x, keys, D] and what is visible, as many at a time as COPIED_BYTES holds; and
        how many keys a core should take at once: all of a row's, unless so few rows would leave cores without work.
        What was given is overwritten by what comes next. Keys and values in unwritten places are 0."""
        (rows, _, keys), dim, both = self.visible.shape, kv.k.shape[3], pools(kv, dtype)
        dtype = both[0].dtype
        most = max(1, COPIED_BYTES // (keys * 2 * dim * dtype.itemsize))
        piece = -(-keys // -(-torch.get_num_threads() // most))  # whatever its neighbours: not by `rows`
        size = 2, min(rows, most), keys, dim
        room = torch.empty(size, dtype=dtype)  # one for all: fresh memory costs more than the copy
        for low in range(0, rows, most):
            some = slice(low, low + most)
            copy = room[:, : min(rows - low, most)]
            for pool, to in zip(both, copy, strict=True):
                if self.pages is not None:
                    read_pages(pool, self.head[some], self.pages[some], to)
                elif self.slots is not None:
                    read_rows(pool, self.slots[some], to)
            if self.unwritten is not None:
                copy[:, :, : kv.page_size].masked_fill_(self.unwritten[some, :, None], 0)
            yield some, copy[0], copy[1], self.visible[some], piece


def _page_keys(kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Array, block: Array, pages: int) -> RowKeys:
    """Of rows without single tokens. The query's own page, the last of a run, comes first; short runs repeat their
    first."""
    seq, pos, size = blocks.seq.numpy()[block], blocks.pos.numpy()[block][:, None], kv.page_size
    count, column = index.count.numpy()[head, block][:, None], np.arange(pages, dtype=np.int32)
    real = column < count
    turned = np.where(real, (column + count - 1) % count, 0)
    page = index.pages.numpy()[index.start.numpy()[head, block][:, None] + turned]
    token = np.arange(size, dtype=np.int32)
    unwritten = token > pos % size
    if (kv.window.numpy()[seq, head][:, None] > pos).all():
        visible = np.ones((len(head), pages * size), dtype=np.bool_)
        visible[:, :size] = ~unwritten
    else:
        visible = _sees(kv, seq, head, (page[..., None] * size + token).reshape(len(head), -1), pos)
    if not real.all():
        visible &= real.repeat(size, 1)
    physical = kv.table.numpy()[seq[:, None], page].astype(np.int64)
    shown, none = torch.from_numpy(visible)[:, None], torch.from_numpy(unwritten)
    return RowKeys(torch.from_numpy(head), torch.from_numpy(physical), None, shown, none)


def _sees(kv: PagedKV, seq: Array, head: Array, key: Array, pos: Array) -> Array:
    """key [X, n], pos [X, 1] -> [X, n]: PagedKV's rule."""
    near = (key > pos - kv.window.numpy()[seq, head][:, None]) | (key < kv.sink.numpy()[seq, head][:, None])
    seen: Array = near & (key <= pos)
    return seen


NO_PAGE = 2**24  # lies in every query's future


def _token_keys(
    kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Array, block: Array, pages: int, singles: int
) -> RowKeys:
    """Of rows with single tokens. Places that a row may not see hold its own key."""
    seq, pos = blocks.seq.numpy()[block], blocks.pos.numpy()[block][:, None]
    page = _run(index.pages, index.start, index.count, head, block, pages, NO_PAGE)
    key = (page[..., None] * kv.page_size + np.arange(kv.page_size, dtype=np.int32)).reshape(len(head), -1)
    assert index.tokens is not None and index.token_start is not None and index.token_count is not None
    single = _run(index.tokens, index.token_start, index.token_count, head, block, singles, NO_PAGE * kv.page_size)
    key = np.concatenate((key, single), 1)
    visible = _sees(kv, seq, head, key, pos)
    key = np.where(visible, key, pos)
    physical = kv.table.numpy()[seq[:, None], key // kv.page_size].astype(np.int64)
    slot = (head[:, None] * kv.k.shape[1] + physical) * kv.page_size + key % kv.page_size
    shown = torch.from_numpy(visible)[:, None]
    return RowKeys(torch.from_numpy(head), None, torch.from_numpy(slot), shown, None)


def _run(values: Tensor, start: Tensor, count: Tensor, head: Array, block: Array, width: int, fill: int) -> Array:
    """[X, width]: values[start[x] : start[x] + count[x]], then `fill`."""
    column = np.arange(width, dtype=np.int32)
    at = np.minimum(start.numpy()[head, block][:, None] + column, values.numel() - 1)
    return np.where(column < count.numpy()[head, block][:, None], values.numpy()[at], np.int32(fill))
