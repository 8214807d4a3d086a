"""Attention of chunks of queries over the selected pages and tokens of the cache."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels.cpu_attention import attend, merge
from gossamer.kernels.cpu_gathered import attend_gathered
from gossamer.kernels.cpu_pages import read_span
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex


def paged_prefill(
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
    """Attend from each query of `blocks` to the keys that `index` selects and that the query may see (PagedKV).

    q, out [T, H, D] (any strides, unit in D); lse [T, H] float32; sinks [H] or None: one extra logit per query head
    in the softmax, with no value. Scores are q . k * scale, then softcap * tanh(scores / softcap) when softcap > 0.
    Writes the rows of the blocks' tokens in `out` and `lse` (natural logarithm of the sum of exponentials, sink
    logit included) for the query heads of kv.heads, and nothing else.
    """
    if len(blocks) == 0:
        return
    if q.is_cuda:
        from gossamer.kernels.triton.paged_prefill import launch

        return launch(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap, sinks=sinks)
    paged_prefill_torch(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap, sinks=sinks)


LEAST_TILES = 4  # shorter stretches of whole tiles are read by copy, many at once
LEAST_IN_PLACE = 1024  # tokens side by side that are worth a call of their own


def paged_prefill_torch(
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
    """What paged_prefill means; also how the CPU runs it: stretches of tiles that read everything from some page on
    are one attention, the others are gathered."""
    whole, rest = _stretches(kv, blocks, index)
    for stretch in whole:
        _attend_whole(q, kv, blocks, stretch, out, lse, scale=scale, softcap=softcap, sinks=sinks)
    if rest.numel():
        attend_gathered(q, kv, blocks, index, rest[0], rest[1], out, lse, scale=scale, softcap=softcap, sinks=sinks)


class Stretch(NamedTuple):
    """Neighbouring tiles of one sequence, for neighbouring heads, that read every key from `begin` on."""

    first_block: int
    last_block: int
    begin: int
    first_head: int
    last_head: int


def _stretches(kv: PagedKV, blocks: QueryBlocks, index: SparseIndex) -> tuple[list[Stretch], Tensor]:
    """Stretches, and the other tiles as [2, X]: head (of kv's) and block."""
    begin = whole_from(kv, blocks, index).tolist()
    heads = kv.heads.tolist()
    whole: list[Stretch] = []
    rest: list[tuple[int, int]] = []
    open_stretches: dict[tuple[int, int, int], int] = {}  # of the head before: (blocks, begin) -> place in `whole`
    for g in range(len(heads)):
        found: dict[tuple[int, int, int], int] = {}
        for first, last, alone in _neighbours(blocks, begin[g]):
            if begin[g][first] < 0 or (last - first + 1 < LEAST_TILES and not alone):
                rest += [(g, n) for n in range(first, last + 1)]
                continue
            key = (first, last, begin[g][first])
            joins = g > 0 and heads[g] == heads[g - 1] + 1 and key in open_stretches
            if joins:
                found[key] = open_stretches[key]
                whole[found[key]] = whole[found[key]]._replace(last_head=g)
            else:
                found[key] = len(whole)
                whole.append(Stretch(*key, g, g))
        open_stretches = found
    return whole, torch.tensor(rest, dtype=torch.long).view(-1, 2).T


def _neighbours(blocks: QueryBlocks, begin: list[int]) -> Iterator[tuple[int, int, bool]]:
    """(first, last, whether these are all of the sequence) of each stretch of adjoining tiles, equal in `begin`."""
    rows, first = blocks.rows, 0
    for n in range(1, len(rows) + 1):
        before = rows[n - 1]
        joined = (
            n < len(rows)
            and begin[n] == begin[n - 1]
            and rows[n][:3] == (before.seq, before.token + before.count, before.pos + before.count)
        )
        if not joined:
            alone = (first == 0 or rows[first - 1].seq != rows[first].seq) and (
                n == len(rows) or rows[n].seq != rows[first].seq
            )
            yield first, n - 1, alone
            first = n


def whole_from(kv: PagedKV, blocks: QueryBlocks, index: SparseIndex) -> Tensor:
    """[G, N]: the position from which on a tile reads everything up to its own queries, or -1 where it does not, or
    where its queries may not see all of that."""
    seq, count = blocks.seq.long(), index.count.long()
    first = index.pages[index.start.long()].long()
    last = index.pages[index.start.long() + count - 1].long()
    begin = first * kv.page_size
    newest = blocks.pos.long() + blocks.count.long() - 1
    visible = (begin > newest - kv.window[seq].T) | (newest < kv.sink[seq].T)
    whole = (last - first + 1 == count) & visible
    if index.token_count is not None:
        whole &= index.token_count == 0
    return begin.masked_fill(~whole, -1)


def _attend_whole(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    stretch: Stretch,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """The keys before the stretch are seen by all of its queries; its own are a causal square."""
    row, last = blocks.rows[stretch.first_block], blocks.rows[stretch.last_block]
    end = last.pos + last.count
    queries = end - row.pos
    heads = slice(stretch.first_head, stretch.last_head + 1)
    ratio, low = kv.ratio, int(kv.heads[stretch.first_head]) * kv.ratio
    query_heads = slice(low, low + (heads.stop - heads.start) * ratio)
    tokens = slice(row.token, row.token + queries)
    packed = q[tokens, query_heads].unflatten(1, (-1, ratio)).permute(1, 2, 0, 3)
    shortest = max(LEAST_IN_PLACE, queries)  # a copy costs its keys, joining a part costs the queries
    before = read_span(kv, row.seq, heads, stretch.begin, row.pos, shortest=shortest, dtype=q.dtype)
    parts = [attend(packed, k, v, scale=scale, softcap=softcap) for k, v in before]
    ((k, v),) = read_span(kv, row.seq, heads, row.pos, end, shortest=end, dtype=q.dtype)
    parts.append(attend(packed, k, v, scale=scale, softcap=softcap, causal=True))
    merged, total = merge(parts, None if sinks is None else sinks[query_heads].view(-1, ratio))
    out[tokens, query_heads].unflatten(1, (-1, ratio)).permute(1, 2, 0, 3).copy_(merged)
    lse[tokens, query_heads].unflatten(1, (-1, ratio)).permute(1, 2, 0).copy_(total)
