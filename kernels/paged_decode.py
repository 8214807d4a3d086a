"""Attention of one query per sequence over the selected pages and tokens of the cache."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels.cpu_attention import Part, attend_in_pieces, merge
from gossamer.kernels.cpu_pages import in_place, pools, read_span
from gossamer.kernels.cpu_rows import attend_rows
from gossamer.kernels.layout import Array, PagedKV, QueryBlocks, SparseIndex


def paged_decode(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """As paged_prefill, for blocks of one query each (blocks.size == 1)."""
    assert blocks.size == 1
    if len(blocks) == 0:
        return
    if q.is_cuda:
        from gossamer.kernels.triton.paged_decode import launch

        return launch(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap, sinks=sinks)
    paged_decode_torch(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap, sinks=sinks)


SHORT_PAGES, MANY = 2, 8  # so many sequences that are so short are copied together and read in one call
LEAST_IN_PLACE = 1024  # tokens side by side that are worth a call of their own, where a run is in several places
PIECE = 4096  # keys that a core takes at once where heads cannot be shared out evenly


def paged_decode_torch(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """What paged_decode means; also how the CPU runs it: runs without gaps are read in place, sequence by
    sequence; scattered ones, and short ones when there are many, are gathered."""
    heads = kv.heads.tolist()
    runs, rest = _runs_in_place(kv, blocks, index, heads)
    threads = torch.get_num_threads()
    for run in runs:
        piece = PIECE if (run.last_head - run.first_head + 1) % threads else 2**62
        row, ratio = blocks.rows[run.block], kv.ratio
        low, high = heads[run.first_head] * ratio, (heads[run.last_head] + 1) * ratio
        packed = q[row.token, low:high].unflatten(0, (-1, ratio)).unsqueeze(2)
        parts: list[Part] = []
        for k, v in _read(kv, run, row.seq, row.pos, q.dtype):
            parts += attend_in_pieces(packed, k, v, scale=scale, softcap=softcap, piece=piece)
        merged, total = merge(parts, None if sinks is None else sinks[low:high].view(-1, ratio))
        out[row.token, low:high] = merged.flatten(0, 2)
        lse[row.token, low:high] = total.flatten()
    if len(rest[0]):
        attend_rows(q, kv, blocks, index, *rest, out, lse, scale=scale, softcap=softcap, sinks=sinks)


class Run(NamedTuple):
    """A run of pages without gaps, for neighbouring heads that agree in it."""

    block: int
    first_page: int
    physical: int  # of the first page
    breaks: int  # times that the next page is not the physical neighbour
    sink: int
    window: int
    first_head: int
    last_head: int


def _runs_in_place(
    kv: PagedKV, blocks: QueryBlocks, index: SparseIndex, heads: list[int]
) -> tuple[list[Run], tuple[Array, Array]]:
    """Runs to read in place, and of the other rows head (of kv's) and block, [X] each. In numpy, whose small operations
    take a third of the time of torch's: with short contexts this is what a step consists of."""
    start, count, pages = index.start.numpy(), index.count.numpy(), index.pages.numpy()
    first, last = pages[start], pages[start + count - 1]
    chosen = last - first + 1 == count
    if index.token_count is not None:
        chosen &= index.token_count.numpy() == 0
    short = chosen & (count <= SHORT_PAGES)
    if short[0].sum() >= MANY:
        chosen &= ~short
    head, block = (~chosen).nonzero()
    rest = head, block
    if not chosen.any():
        return [], rest
    seq = blocks.seq.numpy()
    table = kv.table.numpy()[seq]
    breaks = np.zeros(table.shape, dtype=np.int64)
    np.cumsum(table[:, 1:] - table[:, :-1] != 1, axis=1, out=breaks[:, 1:])
    row = np.arange(len(blocks))[None]
    facts = (first, table[row, first], breaks[row, last] - breaks[row, first])
    rules = (kv.sink.numpy()[seq].T, kv.window.numpy()[seq].T)
    rows, wanted = np.stack((*facts, *rules), -1).tolist(), chosen.tolist()
    runs: list[Run] = []
    for n in range(len(blocks)):
        for g in range(len(heads)):
            if not wanted[g][n]:
                continue
            first_page, physical, times, sink, window = rows[g][n]
            run = Run(n, first_page, physical, times, sink, window, g, g)
            if runs and runs[-1][:6] == run[:6] and runs[-1].last_head == g - 1 and heads[g] == heads[g - 1] + 1:
                run = run._replace(first_head=runs.pop().first_head)
            runs.append(run)
    return runs, rest


def _read(kv: PagedKV, run: Run, seq: int, pos: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [heads, tokens, D] that the query at `pos` may see of the run; `dtype` as for `pools`."""
    heads, size = slice(run.first_head, run.last_head + 1), kv.page_size
    pieces = []
    for begin, end in _visible_spans(run.first_page * size, run.sink, run.window, pos):
        if run.breaks:
            pieces += read_span(kv, seq, heads, begin, end, shortest=LEAST_IN_PLACE, dtype=dtype)
        else:
            slot = (run.physical - run.first_page) * size + begin
            k, v = (in_place(pool, heads, slot, end - begin) for pool in pools(kv, dtype))
            pieces.append((k, v))
    return pieces


def _visible_spans(begin: int, sink: int, window: int, pos: int) -> list[tuple[int, int]]:
    """What the query at `pos` may see of the keys from `begin` on: two spans when the window leaves a gap."""
    recent = max(begin, pos - window + 1)
    if recent <= max(begin, sink):
        return [(begin, pos + 1)]
    return [(low, high) for low, high in ((begin, sink), (recent, pos + 1)) if low < high]
