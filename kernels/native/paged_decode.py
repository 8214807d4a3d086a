"""kernels/paged_decode.py, compiled for the CPU: runs are cut into pieces, which the threads take one after the other,
and what was found in them is joined."""

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.native.attend import KEYS, LOWEST, attend_of
from gossamer.kernels.native.lanes import LANES, add, load, multiply, splat, store, store_of
from gossamer.kernels.native.queries import kind_of, read_queries, rows_of
from gossamer.kernels.native.team import Body, compiled, float32_at, int32_at, int64_at, job, run, take
from gossamer.kernels.native.tile import FOUR

PAGES = 16  # of a piece, or as many single tokens as fit into them: cut by a run's own length alone, on any number of
# threads and beside any neighbours, so that these do not decide how its sums round

INTEGERS = (
    "next", "pieces", "item_piece", "items", "blocks", "groups", "found", "found_row",
    "start", "count", "pages", "token_start", "token_count", "tokens",
    "seq", "token", "pos", "heads", "table", "table_row", "sink", "window", "rule_row",
    "k", "v", "kv_head", "kv_page", "kv_row", "page_size", "dim", "ratio",
    "q", "q_kind", "q_token", "q_head", "out", "out_kind", "out_token", "out_head",
    "lse", "lse_token", "lse_head", "sinks",
)  # fmt: skip
JOB = np.dtype([*((name, "i8") for name in INTEGERS), ("scale", "f4"), ("softcap", "f4")])


def launch(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    assert kv.sink.stride() == kv.window.stride()
    start, count = index.start.contiguous(), index.count.contiguous()
    pieces = -(-count.numpy().ravel() // PAGES)
    token_start = token_count = None
    if index.token_start is not None and index.token_count is not None:
        token_start, token_count = index.token_start.contiguous(), index.token_count.contiguous()
        pieces = pieces - -token_count.numpy().ravel() // (PAGES * kv.page_size)
    item_piece = np.zeros(len(pieces) + 1, dtype=np.int64)  # the first piece of each item, and of none
    np.cumsum(pieces, out=item_piece[1:])
    dim, rows = kv.k.shape[3], -(-kv.ratio // FOUR)
    # What a piece leaves for four queries: largest scores and sums of weights, each four times, and sums of values.
    found = torch.empty(int(item_piece[-1]), rows, 2 * LANES + FOUR * dim)
    taken, held = torch.zeros(2, dtype=torch.int64), torch.from_numpy(item_piece)
    sinks = None if sinks is None else sinks.float().contiguous()
    (q_kind, q_token, q_head), (out_kind, out_token, out_head) = rows_of(q), rows_of(out)
    _, lse_token, lse_head = rows_of(lse)
    head, page, row = (step * kv.k.element_size() for step in kv.k.stride()[:3])
    work = job(
        JOB, next=taken, pieces=len(found), item_piece=held, items=len(pieces), blocks=len(blocks),
        groups=len(kv.heads), found=found, found_row=found.shape[2], start=start, count=count,
        pages=index.pages, token_start=token_start,
        token_count=token_count, tokens=index.tokens, seq=blocks.seq, token=blocks.token, pos=blocks.pos,
        heads=kv.heads, table=kv.table, table_row=kv.table.stride(0), sink=kv.sink,
        window=kv.window, rule_row=kv.sink.stride(0), k=kv.k, v=kv.v, kv_head=head, kv_page=page, kv_row=row,
        page_size=kv.page_size, dim=dim, ratio=kv.ratio, q=q, q_kind=q_kind, q_token=q_token, q_head=q_head,
        out=out, out_kind=out_kind, out_token=out_token, out_head=out_head, lse=lse, lse_token=lse_token,
        lse_head=lse_head, sinks=sinks, scale=scale, softcap=softcap,
    )  # fmt: skip
    run(attend_pieces(kind_of(kv.k)), work)
    work["next"] = taken[1:].data_ptr()
    run(join_pieces(), work)


@functools.cache
def attend_pieces(kind: str) -> Body:
    attend = attend_of(kind)

    def body(at):
        work = carray(at, 1)[0]
        keys = np.empty(PAGES * work.page_size + FOUR, np.int64)
        room = np.empty(FOUR * work.dim + FOUR * KEYS + LANES, np.float32)
        q = room.ctypes.data // 64 * 64 + 64
        while True:
            piece = take(work.next)
            if piece >= work.pieces:
                room[0] = 0  # Numba frees it after the last use that it sees
                return
            item = _item_of(work, piece)
            listed = _list_keys(work, item, piece, keys)
            for row in range(0, work.ratio, FOUR):
                real = work.ratio - row
                read_queries(q, _query(work, item, row), work.q_kind, work.q_head, real, work.dim, work.scale)
                best = work.found + 4 * work.found_row * (piece * ((work.ratio + FOUR - 1) // FOUR) + row // FOUR)
                total, sums = best + 4 * LANES, best + 8 * LANES
                store(best, splat(LOWEST))
                for j in range(0, FOUR * work.dim + LANES, LANES):
                    store(total + 4 * j, splat(np.float32(0)))
                scores = q + 4 * FOUR * work.dim
                own, cap = keys[: listed + FOUR], work.softcap
                for first in range(0, listed, KEYS):
                    last = min(first + KEYS, listed)
                    attend(q, work.k, work.v, own, first, last, work.dim, cap, scores, best, total, sums)

    return compiled(JOB, body)


@njit(error_model="numpy")
def _item_of(work, piece):
    """The head and block whose piece it is: g * N + n."""
    first = carray(int64_at(work.item_piece), work.items + 1)
    low, high = 0, work.items
    while high - low > 1:
        middle = (low + high) // 2
        if first[middle] <= piece:
            low = middle
        else:
            high = middle
    return low


@njit(error_model="numpy")
def _list_keys(work, item, piece, keys):
    """Where the keys of a piece that its query may see lie -> how many; four more places are filled."""
    n, g, size = item % work.blocks, item // work.blocks, work.page_size
    seq, pos = carray(int32_at(work.seq), work.blocks)[n], carray(int32_at(work.pos), work.blocks)[n]
    table = carray(int32_at(work.table + 4 * seq * work.table_row), work.table_row)
    sink = carray(int32_at(work.sink + 4 * seq * work.rule_row), work.groups)[g]
    oldest = pos + 1 - carray(int32_at(work.window + 4 * seq * work.rule_row), work.groups)[g]
    first, listed = g * work.kv_head, 0
    count = carray(int32_at(work.count), work.items)[item]
    own = piece - carray(int64_at(work.item_piece), work.items)[item]
    of_pages = (count + PAGES - 1) // PAGES
    if own < of_pages:
        begin = carray(int32_at(work.start), work.items)[item]
        pages = carray(int32_at(work.pages), begin + count)
        for i in range(begin + own * PAGES, begin + min((own + 1) * PAGES, count)):
            page = np.int64(pages[i])
            at = first + table[page] * work.kv_page - page * size * work.kv_row
            for key in range(page * size, min((page + 1) * size, pos + 1)):
                if key >= oldest or key < sink:
                    keys[listed] = at + key * work.kv_row
                    listed += 1
    else:
        begin = carray(int32_at(work.token_start), work.items)[item]
        end = begin + carray(int32_at(work.token_count), work.items)[item]
        tokens = carray(int32_at(work.tokens), end)
        begin += (own - of_pages) * PAGES * size
        for i in range(begin, min(begin + PAGES * size, end)):
            token = np.int64(tokens[i])
            if token <= pos and (token >= oldest or token < sink):
                keys[listed] = first + table[token // size] * work.kv_page + token % size * work.kv_row
                listed += 1
    for i in range(FOUR):
        keys[listed + i] = keys[0]
    return listed


_store_float16, _store_bfloat16 = store_of("float16"), store_of("bfloat16")


@njit(error_model="numpy")
def _query(work, item, row):
    """Address of the query of that row of the item's group."""
    token = carray(int32_at(work.token), work.blocks)[item % work.blocks]
    head = carray(int32_at(work.heads), work.groups)[item // work.blocks] * work.ratio + row
    return work.q + token * work.q_token + head * work.q_head


@functools.cache
def join_pieces() -> Body:
    def body(at):
        work = carray(at, 1)[0]
        while True:
            item = take(work.next)
            if item >= work.items:
                return
            for row in range(work.ratio):
                _join_row(work, item, row)

    return compiled(JOB, body)


@njit(error_model="numpy")
def _join_row(work, item, row):
    """Writes what one query gets from all pieces of its run."""
    token = carray(int32_at(work.token), work.blocks)[item % work.blocks]
    head = carray(int32_at(work.heads), work.groups)[item // work.blocks] * work.ratio + row
    held = carray(int64_at(work.item_piece), work.items + 1)
    step, rows = work.found_row, (work.ratio + FOUR - 1) // FOUR
    place, lane = work.found + 4 * step * (held[item] * rows + row // FOUR), row % FOUR
    pieces = held[item + 1] - held[item]
    best: Any = LOWEST
    for p in range(pieces):
        best = max(best, carray(float32_at(place + 4 * step * rows * p), step)[lane])
    total = np.float32(0)
    if work.sinks != 0:
        sink = carray(float32_at(work.sinks), head + 1)[head]
        best = max(best, sink)
        total = np.float32(math.exp(sink - best))
    for p in range(pieces):
        found = carray(float32_at(place + 4 * step * rows * p), step)
        share = np.float32(math.exp(found[lane] - best))
        found[lane] = share
        total += share * found[LANES + lane]
    seen = total > 0
    carray(float32_at(work.lse + token * work.lse_token + head * work.lse_head), 1)[0] = (
        best + np.float32(math.log(total)) if seen else np.float32(-np.inf)
    )
    whole = np.float32(1) / total if seen else np.float32(0)
    to = work.out + token * work.out_token + head * work.out_head
    for j in range(0, work.dim, LANES):
        sums = splat(np.float32(0))
        for p in range(pieces):
            at = place + 4 * step * rows * p
            share = splat(carray(float32_at(at), step)[lane])
            sums = add(sums, multiply(share, load(at + 4 * (2 * LANES + lane * work.dim + j))))
        sums = multiply(sums, splat(whole))
        if work.out_kind == 0:
            store(to + 4 * j, sums)
        elif work.out_kind == 1:
            _store_float16(to + 2 * j, sums)
        else:
            _store_bfloat16(to + 2 * j, sums)
