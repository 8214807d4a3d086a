"""Attention of one query per sequence over the selected pages and tokens of the cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels.cpu_attention import Part, attend_in_pieces, merge
from gossamer.kernels.cpu_gathered import attend_gathered
from gossamer.kernels.cpu_pages import read_span
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex


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


SHORT_PAGES = 8  # up to here many sequences are copied together and read at once; longer ones are read in place
LEAST_IN_PLACE = 1024  # tokens side by side that are worth a call of their own
PIECE = 4096  # keys per core where there are more cores than heads


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
    """What paged_decode means; also how the CPU runs it: long runs without gaps are read in place, sequence by
    sequence; short and scattered ones are gathered. A row's own run decides, not its neighbours."""
    runs, rest = _long_runs(kv, blocks, index)
    piece = PIECE if kv.heads.numel() < torch.get_num_threads() else 2**62
    for run in runs:
        row, ratio = blocks.rows[run.block], kv.ratio
        low = int(kv.heads[run.first_head]) * ratio
        heads = slice(run.first_head, run.last_head + 1)
        query_heads = slice(low, low + (heads.stop - heads.start) * ratio)
        packed = q[row.token, query_heads].view(-1, ratio, 1, q.shape[2])
        parts: list[Part] = []
        for begin, end in _visible_spans(run, row.pos):
            for k, v in read_span(kv, row.seq, heads, begin, end, shortest=LEAST_IN_PLACE):
                parts += attend_in_pieces(packed, k, v, scale=scale, softcap=softcap, piece=piece)
        merged, total = merge(parts, None if sinks is None else sinks[query_heads].view(-1, ratio))
        out[row.token, query_heads] = merged.flatten(0, 2).to(out.dtype)
        lse[row.token, query_heads] = total.flatten()
    if rest.numel():
        attend_gathered(q, kv, blocks, index, rest[0], rest[1], out, lse, scale=scale, softcap=softcap, sinks=sinks)


class Run(NamedTuple):
    """A long run of pages without gaps, for neighbouring heads that agree in it."""

    block: int
    begin: int  # position of its first key
    sink: int
    window: int
    first_head: int
    last_head: int


def _long_runs(kv: PagedKV, blocks: QueryBlocks, index: SparseIndex) -> tuple[list[Run], Tensor]:
    """Long runs, and the other rows as [2, X]: head (of kv's) and block."""
    count = index.count.long()
    first = index.pages[index.start.long()].long()
    last = index.pages[index.start.long() + count - 1].long()
    chosen = (last - first + 1 == count) & (count > SHORT_PAGES)
    if index.token_count is not None:
        chosen &= index.token_count == 0
    if not bool(chosen.any()):
        return [], (~chosen).nonzero().T
    seq = blocks.seq.long()
    facts = torch.stack((first * kv.page_size, kv.sink[seq].T, kv.window[seq].T), -1).tolist()
    heads, long = kv.heads.tolist(), chosen.tolist()
    runs: list[Run] = []
    for n in range(len(blocks)):
        for g in range(len(heads)):
            if not long[g][n]:
                continue
            run = Run(n, *facts[g][n], g, g)
            if runs and runs[-1][:4] == run[:4] and runs[-1].last_head == g - 1 and heads[g] == heads[g - 1] + 1:
                run = run._replace(first_head=runs.pop().first_head)
            runs.append(run)
    return runs, (~chosen).nonzero().T


def _visible_spans(run: Run, pos: int) -> list[tuple[int, int]]:
    """What the query at `pos` may see of the run: two spans when the window leaves a gap behind the sink."""
    recent = max(run.begin, pos - run.window + 1)
    if recent <= max(run.begin, run.sink):
        return [(run.begin, pos + 1)]
    spans = [(run.begin, run.sink), (recent, pos + 1)]
    return [span for span in spans if span[0] < span[1]]
