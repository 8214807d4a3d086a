"""A second look at what one head was given: the same queries attend to every key, and the two are compared.

Plain torch in float32 over what the cache holds. It does not go through the kernels, so it sees their faults too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels.fp8 import dequantise
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, PagedKV, QueryBlocks, SparseIndex

QUERIES = 16  # of a tile, at most, that look twice
MOST_TOKENS = 2**14  # whose keys are looked at together
MOST_SCORES = 2**21  # ... times the query heads that look


class Check(NamedTuple):
    """One head's second look, for some queries of one query block."""

    point: str
    decode: bool
    layers: str  # the group of layers: "0-10"
    layer: int
    head: int  # KV head of the layer
    block: int  # among the step's blocks of its kind


class Quality(NamedTuple):
    """What a check found, over its queries and query heads."""

    recall: float  # share of the dense attention mass that the keys hold that were read; mean
    error: float  # |o - o_dense| / |o_dense|, before the output projection
    top1: float  # share of them for whom the key that weighs most was read
    density: float  # share of the keys that was read; mean


class Watch:
    """The checks of one step, made while its layers attend."""

    __slots__ = ("_found", "_left", "blind", "made")

    def __init__(self, checks: Sequence[Check], blind: Sequence[Check]) -> None:
        self._left = list(checks)
        self._found: list[Tensor] = []
        self.made: list[Check] = []
        self.blind = tuple(blind)  # those that cannot be made: the head has given keys back

    @property
    def found(self) -> Tensor:
        """[len(made), 4] float32, `Quality`'s numbers, on the device."""
        return torch.stack(self._found)

    def look(
        self, layer: int, heads: Sequence[int], q: Tensor, kv: PagedKV, blocks: QueryBlocks, index: SparseIndex,
        out: Tensor, *, scale: float, softcap: float, sinks: Tensor | None,
    ) -> None:  # fmt: skip
        """Make those of the layer for `heads`, which are those of `kv`, in blocks of this kind, as they have attended.
        q and out [T, H, D]. A check for which there is no memory is not made."""
        for check in self._left:
            if check.layer != layer or check.head not in heads or check.decode != (blocks.size == 1):
                continue
            own = slice(check.head * kv.ratio, (check.head + 1) * kv.ratio)
            at, row = heads.index(check.head), blocks.rows[check.block]
            which = rows_of(row)
            logits = None if sinks is None else sinks[own]
            try:
                read = read_keys(index, at, check.block, row.pos + row.count)
                given = q[which, own], out[which, own]
                found = compare(*given, kv, at, row, read, scale=scale, softcap=softcap, sinks=logits)
            except torch.OutOfMemoryError:
                self.blind = (*self.blind, check)
                continue
            self.made.append(check)
            self._found.append(found)


def rows_of(row: BlockRow) -> slice:
    """The queries of a block that look twice, among the step's tokens: evenly spread, and the first is one."""
    return slice(row.token, row.token + row.count, -(-row.count // QUERIES))


def read_keys(index: SparseIndex, head: int, block: int, length: int) -> Tensor:
    """[length] bool: the positions that one block of an index reads, whether or not a query may see them."""
    size = PAGE_SIZE
    pages = _run(index.pages, index.start[head, block], index.count[head, block], -(-length // size))
    read = pages.repeat_interleave(size)[:length]
    if index.tokens is not None and index.token_start is not None and index.token_count is not None:
        read |= _run(index.tokens, index.token_start[head, block], index.token_count[head, block], length)
    return read


def _run(numbers: Tensor, start: Tensor, count: Tensor, limit: int) -> Tensor:
    """[limit] bool, which numbers below `limit` are in a run; they are ascending and without repeats."""
    places = torch.arange(limit, device=numbers.device)
    inside = places < count
    found = numbers[torch.where(inside, start + places, 0).clamp(max=len(numbers) - 1)].long()
    marked = torch.zeros(limit + 1, dtype=torch.bool, device=numbers.device)
    marked.scatter_(0, torch.where(inside, found, limit), True)
    return marked[:limit]


def compare(
    q: Tensor, out: Tensor, kv: PagedKV, head: int, row: BlockRow, read: Tensor, *,
    scale: float, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q and out [R, ratio, D]: the queries `rows_of(row)` of one KV head and what they were given, from the keys where
    `read` [row.pos + row.count] -> [4] float32 on the device, `Quality`'s numbers. `head` is the number of the head
    in `kv`, which still has all its pages. sinks [ratio]: logits that take mass and give nothing.

    Online softmax over runs of keys, so that memory does not grow with the length; nothing waits for the device.
    """
    queries, ratio, dim = q.shape
    rows = queries * ratio
    device = q.device
    pos = torch.arange(row.pos, row.pos + row.count, -(-row.count // QUERIES), device=device)[:, None]  # [R, 1]
    flat = q.float().flatten(0, 1) * scale
    best = torch.full((rows,), -torch.inf, device=device)  # the largest logit so far
    best_read = torch.zeros(rows, dtype=torch.bool, device=device)
    mass, kept = torch.zeros(2, rows, device=device)
    dense = torch.zeros(rows, dim, device=device)
    sink, window = kv.sink[row.seq, head], kv.window[row.seq, head]
    seen = torch.zeros(queries, device=device)
    length = row.pos + row.count
    piece = max(1, min(MOST_TOKENS, MOST_SCORES // rows) // kv.page_size) * kv.page_size
    for first in range(0, length, piece):
        last = min(first + piece, length)
        k, v = _stored(kv, row.seq, head, first, last)
        scores = flat @ k.T
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        key = torch.arange(first, last, device=device)
        mine = read[first:last] & ((key > pos - window) | (key < sink))  # [R, keys]
        if last > row.pos:  # some keys come after some of the queries
            causal = key <= pos
            mine &= causal
            scores.unflatten(0, (queries, ratio)).masked_fill_(~causal[:, None], -torch.inf)
        top, place = scores.max(-1)
        higher = top > best
        newest = torch.maximum(best, top)
        shrink = (best - newest).exp()
        weights = scores.sub_(newest[:, None]).exp_()
        own = weights.unflatten(0, (queries, ratio)) @ mine.float()[..., None]  # [R, ratio, 1]
        best_read = torch.where(higher, mine.gather(1, place.view(queries, ratio)).flatten(), best_read)
        mass = mass * shrink + weights.sum(-1)
        kept = kept * shrink + own.flatten()
        dense = dense * shrink[:, None] + weights @ v
        seen = seen + mine.sum(-1)
        best = newest
    whole = mass
    if sinks is not None:
        whole = mass + (sinks.float().repeat(queries) - best).exp()
    dense = dense / whole[:, None]
    error = (out.float().flatten(0, 1) - dense).norm() / dense.norm().clamp_min(1e-20)
    density = (seen / (pos[:, 0] + 1)).mean()
    return torch.stack([(kept / mass).mean(), error, best_read.float().mean(), density])


def _stored(kv: PagedKV, seq: int, head: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Keys and values [last - first, D] float32 of a sequence's positions first ... last - 1; first begins a page."""
    size = kv.page_size
    pages = kv.table[seq, first // size : -(-last // size)].long()

    def take(pool: Tensor, scale: Tensor | None) -> Tensor:
        own = pool[head].view(torch.uint8)[pages] if scale is not None else pool[head][pages]
        wide = own.float() if scale is None else dequantise(own, scale[head][pages], torch.float32)
        return wide.flatten(0, 1)[: last - first]

    return take(kv.k, kv.key_scale), take(kv.v, kv.value_scale)
