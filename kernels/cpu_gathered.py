"""Attention of tiles whose keys are scattered: copy what many tiles read, then attend for all of them at once (CPU)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.cpu_attention import attend, merge
from gossamer.kernels.cpu_pages import Pool, pools, read_pages, read_rows
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex

COPIED_BYTES = 16 << 20  # keys and values copied at once: they should still be in the cache when they are read


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of different lengths, end to end: list x is values[start[x] : start[x] + count[x]]."""

    values: Tensor
    start: Tensor  # [X]
    count: Tensor  # [X]

    @classmethod
    def of(cls, values: Tensor, row: Tensor, rows: int) -> "Ragged":
        """values[i] belongs to list row[i]; row ascends."""
        count = torch.bincount(row, minlength=rows)
        return cls(values, count.cumsum(0) - count, count)

    def padded(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """[rows, width] values, and which of them are real; the others repeat one that is (if the list has any)."""
        column = torch.arange(width)
        count = self.count[rows][:, None]
        at = self.start[rows][:, None] + torch.minimum(column, count - 1).clamp(min=0)
        return self.values[at.clamp(max=self.values.numel() - 1)], column < count


def ragged_rows(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Runs start, count [X] -> the row and the place in the index of each of their entries, end to end."""
    count = count.long()
    row = torch.arange(count.numel()).repeat_interleave(count)
    within = torch.arange(row.numel()) - (count.cumsum(0) - count)[row]
    return row, start.long()[row] + within


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles (one KV head, one query block each) that are read by copy, and what they read."""

    head: Tensor  # [X] which of kv's heads
    seq: Tensor  # [X]
    token: Tensor  # [X]
    pos: Tensor  # [X]
    count: Tensor  # [X]
    last: Tensor  # [X] position of the last query
    sink: Tensor  # [X]
    window: Tensor  # [X]
    clear: Ragged  # pages that every query of the tile sees whole
    partial: Ragged  # pages that need a look at each key
    single: Ragged | None  # positions of single tokens

    @classmethod
    def of(cls, kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, head: Tensor, block: Tensor) -> "Tiles":
        seq, token, pos, count = (x.long()[block] for x in (blocks.seq, blocks.token, blocks.pos, blocks.count))
        last, sink, window = pos + count - 1, kv.sink[seq, head].long(), kv.window[seq, head].long()
        row, at = ragged_rows(index.start[head, block], index.count[head, block])
        page = index.pages[at].long()
        begin, end = page * kv.page_size, (page + 1) * kv.page_size
        clear = (end <= pos[row] + 1) & ((begin > (last - window)[row]) | (end <= sink[row]))
        single = None
        if index.tokens is not None and index.token_start is not None and index.token_count is not None:
            token_row, token_at = ragged_rows(index.token_start[head, block], index.token_count[head, block])
            if token_row.numel():
                single = Ragged.of(index.tokens[token_at].long(), token_row, head.numel())
        whole = Ragged.of(page[clear], row[clear], head.numel())
        partial = Ragged.of(page[~clear], row[~clear], head.numel())
        return cls(head, seq, token, pos, count, last, sink, window, whole, partial, single)

    def batches(self, token_bytes: int, page_size: int) -> list[tuple[Tensor, int, int, int]]:
        """Tiles to attend for together: row numbers [x], all alike in how much they read, and no more than fits; and
        the widths to pad to: clear pages, partial pages, single tokens. A tile's own counts decide its widths, so
        its result does not depend on its neighbours."""
        single = torch.zeros_like(self.count) if self.single is None else self.single.count
        widths = torch.stack([padded_width(self.clear.count), padded_width(self.partial.count), padded_width(single)])
        key = (widths[0] << 40) | (widths[1] << 24) | widths[2]
        order = key.argsort(stable=True)
        _, sizes = key[order].unique_consecutive(return_counts=True)
        batches, begin = [], 0
        for size in sizes.tolist():
            rows = order[begin : begin + size]
            clear, partial, tokens = widths[:, rows[0]].tolist()
            most = max(1, COPIED_BYTES // (((clear + partial) * page_size + tokens) * token_bytes))
            batches += [(part, clear, partial, tokens) for part in rows.split(most)]
            begin += size
        return batches


def padded_width(count: Tensor) -> Tensor:
    """Rounded up to a power of two below eight, to one of eight steps per power of two above: few widths are left, and
    where the copies are long at most an eighth is wasted."""
    power = count.clamp(min=1).double().log2()
    step = torch.where(count <= 8, torch.exp2(power.ceil()), torch.exp2(power.floor() - 3)).long().clamp(min=1)
    return (count + step - 1) // step * step


def attend_gathered(
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
    """As paged_prefill, for the tiles (head[x], block[x]) alone; head [X] counts kv's heads, block [X] the blocks."""
    tiles = Tiles.of(kv, blocks, index, head, block)
    queries = min(blocks.size, max(row.count for row in blocks.rows))
    flat_q = q.reshape(-1, q.shape[2])
    both = pools(kv, q.dtype)
    batches = tiles.batches(2 * kv.k.shape[3] * both[0].dtype.itemsize, kv.page_size)
    for rows, clear, partial, tokens in batches:
        step = torch.minimum(torch.arange(queries), tiles.count[rows][:, None] - 1)  # a short tile repeats its last
        query = tiles.pos[rows][:, None] + step
        heads = kv.heads.long()[tiles.head[rows]][:, None] * kv.ratio + torch.arange(kv.ratio)
        place = (tiles.token[rows][:, None] + step)[:, None] * q.shape[1] + heads[:, :, None]  # in T * H
        packed = flat_q.index_select(0, place.flatten()).view(*place.shape, -1)
        keys = []
        if clear:
            keys.append(_clear_pages(kv, both, tiles, rows, clear))
        if partial:
            keys.append(_partial_pages(kv, both, tiles, rows, partial, query))
        if tokens and tiles.single is not None:
            keys.append(_single_tokens(kv, both, tiles, tiles.single, rows, tokens, query))
        parts = [attend(packed, k, v, scale=scale, softcap=softcap, visible=visible) for k, v, visible in keys]
        merged, total = merge(parts, None if sinks is None else sinks[heads])
        write_rows(out, place, merged)
        write_rows(lse, place, total)


def write_rows(to: Tensor, place: Tensor, rows: Tensor) -> None:
    """to [T, H, ...], place (any shape) counted over T * H, rows [*place.shape, ...]."""
    if to.is_contiguous():
        to.flatten(0, 1).index_copy_(0, place.flatten(), rows.flatten(0, place.dim() - 1).to(to.dtype))
    else:
        to[place // to.shape[1], place % to.shape[1]] = rows.to(to.dtype)


Both = tuple[Pool, Pool]  # keys and values
Keys = tuple[Tensor, Tensor, Tensor | None]  # k, v [x, n, D]; visible [x, M or 1, n]


def _clear_pages(kv: PagedKV, both: Both, tiles: Tiles, rows: Tensor, width: int) -> Keys:
    page, real = tiles.clear.padded(rows, width)
    place = tiles.head[rows][:, None] * kv.k.shape[1] + kv.table[tiles.seq[rows][:, None], page]
    visible = None if bool(real.all()) else real.repeat_interleave(kv.page_size, 1)[:, None]
    k, v = (read_pages(pool, place) for pool in both)
    return k, v, visible


def _partial_pages(kv: PagedKV, both: Both, tiles: Tiles, rows: Tensor, width: int, query: Tensor) -> Keys:
    page, real = tiles.partial.padded(rows, width)
    place = tiles.head[rows][:, None] * kv.k.shape[1] + kv.table[tiles.seq[rows][:, None], page]
    k, v = (read_pages(pool, place) for pool in both)
    key = (page[..., None] * kv.page_size + torch.arange(kv.page_size)).flatten(1)
    unwritten = (key >= kv.length.long()[tiles.seq[rows]][:, None]).flatten().nonzero().flatten()
    if unwritten.numel():  # whatever lies there times zero must be zero
        k.flatten(0, 1).index_fill_(0, unwritten, 0)
        v.flatten(0, 1).index_fill_(0, unwritten, 0)
    return k, v, _visible(tiles, rows, query, key) & real.repeat_interleave(kv.page_size, 1)[:, None]


def _single_tokens(
    kv: PagedKV, both: Both, tiles: Tiles, single: Ragged, rows: Tensor, width: int, query: Tensor
) -> Keys:
    key, real = single.padded(rows, width)
    # A list without a token borrows position 0 of its sequence, which may have been released: any real row will do.
    page, head = key // kv.page_size, tiles.head[rows]
    physical = kv.table[tiles.seq[rows][:, None], page].long().clamp(min=0)
    slot = (head[:, None] * kv.k.shape[1] + physical) * kv.page_size + key % kv.page_size
    k, v = (read_rows(pool, slot) for pool in both)
    oldest = (tiles.last - tiles.window)[rows][:, None]
    seen = (key <= tiles.pos[rows][:, None]) & ((key > oldest) | (key < tiles.sink[rows][:, None]))
    if bool((seen | ~real).all()):  # by every query of its tile: an index names no single tokens of a tile's own pages
        return k, v, None if bool(real.all()) else real[:, None]
    return k, v, _visible(tiles, rows, query, key) & real[:, None]


def _visible(tiles: Tiles, rows: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """query [x, M], key [x, n] positions -> [x, M, n] bool: PagedKV's rule."""
    window, sink = tiles.window[rows][:, None, None], tiles.sink[rows][:, None]
    near = (key[:, None] > query[..., None] - window) | (key < sink)[:, None]
    return near & (key[:, None] <= query[..., None])
