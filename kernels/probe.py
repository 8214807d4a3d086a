"""Where the newest queries of each sequence look: the mass of single keys and of single distances (MInference)."""

import torch
from torch import Tensor

from gossamer.kernels.cpu_pages import pools
from gossamer.kernels.cpu_sequences import read_head, resident_pages
from gossamer.kernels.layout import BlockRow, PagedKV, QueryBlocks


def probe_mass(q: Tensor, kv: PagedKV, blocks: QueryBlocks, probe: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """q [T, H, D] (any strides, unit in D) -> columns, diagonals, both [G, B, L * S] float32.

    For each sequence with tiles in `blocks`: the softmax of its last min(probe, its queries in `blocks`) queries over
    the keys that they may see (PagedKV) and that were not released. columns[g, b, j] is the mean over these queries
    and the query heads of the KV head of what the key at position j gets, diagonals[g, b, o] the same for the key o
    positions before the query: each adds up to 1. All 0 for sequences without tiles. The tiles of a sequence adjoin
    and ascend.
    """
    if q.is_cuda and len(blocks):
        from gossamer.kernels.triton.probe import launch

        return launch(q, kv, blocks, probe, scale=scale)
    return probe_mass_torch(q, kv, blocks, probe, scale=scale)


def newest_queries(blocks: QueryBlocks, probe: int) -> list[BlockRow]:
    """The last min(probe, all) queries of each sequence in `blocks`, one row per sequence."""
    total: dict[int, int] = {}
    last: dict[int, BlockRow] = {}
    for row in blocks.rows:
        total[row.seq] = total.get(row.seq, 0) + row.count
        last[row.seq] = row
    spans = []
    for seq, row in last.items():
        count = min(probe, total[seq])
        back = count - row.count
        spans.append(BlockRow(seq, row.token - back, row.pos - back, count))
    return spans


WRITTEN = 1 << 22  # scores held at once
READ = 1 << 19  # numbers of keys held at once: they should still be in the cache when they are multiplied


def probe_mass_torch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, probe: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """What probe_mass means; also how the CPU runs it: some queries at a time, all heads of a group together."""
    shape = (kv.heads.numel(), kv.table.shape[0], kv.table.shape[1] * kv.page_size)
    columns, diagonals = torch.zeros(shape, device=q.device), torch.zeros(shape, device=q.device)
    for span in newest_queries(blocks, probe):
        for g in range(shape[0]):
            pages = _visible_pages(kv, span, g)
            step = max(1, WRITTEN // (kv.ratio * pages.numel() * kv.page_size))
            for begin in range(0, span.count, step):
                count = min(step, span.count - begin)
                some = BlockRow(span.seq, span.token + begin, span.pos + begin, count)
                spread = _spread(_weights(q, kv, some, g, pages, scale), pages, kv.page_size)
                rows = span.count * kv.ratio
                columns[g, span.seq, : spread.shape[1]] += spread.sum(0) / rows
                reach = some.pos + count
                diagonals[g, span.seq, :reach] += _sum_diagonals(spread, some.pos) / rows
    return columns, diagonals


def _visible_pages(kv: PagedKV, span: BlockRow, g: int) -> Tensor:
    """The resident pages of which some query of the span may see some key."""
    size = kv.page_size
    pages = resident_pages(kv, span.seq, (span.pos + span.count - 1) // size + 1)
    oldest = span.pos - int(kv.window[span.seq, g]) + 1
    return pages[(pages * size < int(kv.sink[span.seq, g])) | ((pages + 1) * size > oldest)]


def _weights(q: Tensor, kv: PagedKV, span: BlockRow, g: int, pages: Tensor, scale: float) -> Tensor:
    """[queries of the span, pages * S]: their softmax over the keys of `pages`, summed over the group's heads."""
    low, dim = int(kv.heads[g]) * kv.ratio, q.shape[2]
    asked = q[span.token : span.token + span.count, low : low + kv.ratio].transpose(0, 1).float()
    asked = asked.reshape(-1, dim).mul(scale)
    physical = kv.table[span.seq, pages]
    scores = torch.empty(asked.shape[0], pages.numel() * kv.page_size)
    read, (stored, _) = max(1, READ // (kv.page_size * dim)), pools(kv, torch.float32)
    for begin in range(0, pages.numel(), read):
        keys = read_head(stored, g, physical[begin : begin + read]).reshape(-1, dim)
        first = begin * kv.page_size
        torch.mm(asked, keys.T, out=scores[:, first : first + keys.shape[0]])
    by_head = scores.unflatten(0, (kv.ratio, -1))
    key = (pages[:, None] * kv.page_size + torch.arange(kv.page_size)).flatten()
    window, last = int(kv.window[span.seq, g]), span.pos + span.count - 1
    # every query sees all that comes before the first one, unless its window ends
    first = 0 if int(key[0]) <= last - window else int(torch.searchsorted(key, span.pos, right=True))
    at, key = torch.arange(span.pos, last + 1)[:, None], key[first:]
    seen = (key <= at) & ((key > at - window) | (key < kv.sink[span.seq, g]))
    by_head[..., first:].masked_fill_(~seen, -torch.inf)
    weights: Tensor = by_head.softmax(-1)
    return weights.sum(0)


def _spread(weights: Tensor, pages: Tensor, size: int) -> Tensor:
    """weights [m, X * S] of some pages -> [m, positions up to the last of these pages]."""
    reach = int(pages[-1]) + 1
    if pages.numel() == reach:
        return weights
    spread = torch.zeros(weights.shape[0], reach, size)
    spread[:, pages] = weights.unflatten(1, (-1, size))
    return spread.flatten(1)


def _sum_diagonals(weights: Tensor, pos: int) -> Tensor:
    """weights [m, K], row i for the query at position pos + i, 0 behind it -> [pos + m]: the sum for each distance."""
    queries, keys = weights.shape
    reach = pos + queries
    width = keys + queries - 1
    sheared = torch.zeros(queries, width)  # row i is moved by queries - 1 - i, so that a distance is a column
    sheared.as_strided((queries, keys), (width - 1, 1), queries - 1).copy_(weights)
    return sheared[:, :reach].sum(0).flip(0)
