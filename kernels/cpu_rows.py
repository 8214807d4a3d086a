"""Attention of single queries whose keys are scattered: copy what some of them read, then attend for these (CPU)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.cpu_attention import attend_in_pieces, merge
from gossamer.kernels.cpu_gathered import padded_width
from gossamer.kernels.cpu_pages import pools, read_pages, read_rows
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex

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
    counts = index.count[head, block]
    tokens = torch.zeros_like(counts) if index.token_count is None else index.token_count[head, block]
    for rows, pages, singles in _alike(counts, tokens):
        part = (head[rows], block[rows])
        if singles:
            keys = _token_keys(kv, blocks, index, *part, pages, singles)
        else:
            keys = _page_keys(kv, blocks, index, *part, pages)
        heads = kv.heads.long()[part[0]][:, None] * kv.ratio + torch.arange(kv.ratio)
        place = (blocks.token.long()[part[1]][:, None], heads)
        packed = q[place].unsqueeze(2)
        parts = []
        for some, k, v, visible, piece in keys.copies(kv, q.dtype):
            cut = attend_in_pieces(packed[some], k, v, scale=scale, softcap=softcap, visible=visible, piece=piece)
            parts.append(merge(cut))
        whole = (torch.cat([each for each, _ in parts]), torch.cat([each for _, each in parts]))
        merged, total = merge([whole], None if sinks is None else sinks[heads])
        out[place], lse[place] = merged.squeeze(2).to(out.dtype), total.squeeze(2)


def _alike(counts: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Rows that read about as many pages and single tokens, and the widths to pad to, which a row's own counts decide:
    its result does not depend on its neighbours."""
    if bool((counts == counts[0]).all() & (tokens == tokens[0]).all()):
        yield torch.arange(len(counts)), *_widths(counts[:1], tokens[:1])[0].tolist()
        return
    widths = _widths(counts, tokens)
    for pages, singles in widths.unique(dim=0).tolist():
        yield ((widths[:, 0] == pages) & (widths[:, 1] == singles)).nonzero().flatten(), pages, singles


def _widths(counts: Tensor, tokens: Tensor) -> Tensor:
    """[X, 2]"""
    return torch.stack((padded_width(counts.long()), padded_width(tokens.long()) * (tokens > 0)), 1)


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


def _page_keys(
    kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Tensor, block: Tensor, pages: int
) -> RowKeys:
    """Of rows without single tokens. The query's own page, the last of a run, comes first; short runs repeat their
    first."""
    seq, pos, size = blocks.seq[block], blocks.pos[block][:, None], kv.page_size
    count, column = index.count[head, block][:, None], torch.arange(pages, dtype=torch.int32)
    real = column < count
    turned = torch.where(real, (column + count - 1) % count, 0)
    page = index.pages[index.start[head, block][:, None] + turned]
    token = torch.arange(size, dtype=torch.int32)
    unwritten = token > pos % size
    if bool((kv.window[seq, head][:, None] > pos).all()):
        visible = torch.ones(len(head), pages * size, dtype=torch.bool)
        visible[:, :size] = ~unwritten
    else:
        visible = _sees(kv, seq, head, (page[..., None] * size + token).flatten(1), pos)
    if not bool(real.all()):
        visible &= real.repeat_interleave(size, 1)
    return RowKeys(head, kv.table[seq[:, None], page].long(), None, visible[:, None], unwritten)


def _sees(kv: PagedKV, seq: Tensor, head: Tensor, key: Tensor, pos: Tensor) -> Tensor:
    """key [X, n], pos [X, 1] -> [X, n]: PagedKV's rule."""
    near = (key > pos - kv.window[seq, head][:, None]) | (key < kv.sink[seq, head][:, None])
    return near & (key <= pos)


NO_PAGE = 2**24  # lies in every query's future


def _token_keys(
    kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Tensor, block: Tensor, pages: int, singles: int
) -> RowKeys:
    """Of rows with single tokens. Places that a row may not see hold its own key."""
    seq, pos = blocks.seq[block], blocks.pos[block][:, None]
    page = _run(index.pages, index.start[head, block], index.count[head, block], pages, NO_PAGE)
    key = (page[..., None] * kv.page_size + torch.arange(kv.page_size, dtype=torch.int32)).flatten(1)
    assert index.tokens is not None and index.token_start is not None and index.token_count is not None
    run = index.token_start[head, block], index.token_count[head, block]
    key = torch.cat((key, _run(index.tokens, *run, singles, NO_PAGE * kv.page_size)), 1)
    visible = _sees(kv, seq, head, key, pos)
    key = torch.where(visible, key, pos)
    physical = kv.table[seq[:, None], key // kv.page_size].long()
    slot = (head[:, None] * kv.k.shape[1] + physical) * kv.page_size + key % kv.page_size
    return RowKeys(head, None, slot, visible[:, None], None)


def _run(values: Tensor, start: Tensor, count: Tensor, width: int, fill: int) -> Tensor:
    """[X, width]: values[start[x] : start[x] + count[x]], then `fill`."""
    column = torch.arange(width, dtype=torch.int32)
    at = (start[:, None] + column).clamp(max=values.numel() - 1)
    return values[at].masked_fill(column >= count[:, None], fill)
