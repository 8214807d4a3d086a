"""kernels/cpu_scores.py for one query a sequence, compiled: a thread takes one head of a sequence after another."""

import functools

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.native.attend import KEYS, LINE, LOWEST
from gossamer.kernels.native.lanes import (
    LANES,
    SIZES,
    add,
    divide,
    exp,
    larger,
    largest_of_queries,
    largest_over_keys,
    load,
    multiply,
    of_queries,
    prefetch,
    splat,
    store,
    store_number,
    subtract,
    sum_over_keys,
)
from gossamer.kernels.native.queries import kind_of, read_queries, rows_of
from gossamer.kernels.native.team import Body, compiled, float32_at, int32_at, job, run, take
from gossamer.kernels.native.tile import (
    FOUR,
    add_products_of,
    add_products_with_sixteen,
    by_key,
    four_zeros,
    totals,
    zeros,
)

SHORT = 64  # channels of keys that are turned rather than summed across
LISTED = 1024  # keys whose places are worked out at once
FLOOR, TINY = np.float32(-1e20), np.float32(1e-30)  # below any score, above LOWEST; below any sum of weights

INTEGERS = (
    "next", "items", "blocks", "groups", "seq", "token", "pos", "heads", "ratio", "size", "page_size", "table",
    "table_row", "q", "q_kind", "q_token", "q_head", "q_dim", "split", "channels", "dim", "keys", "key_head",
    "key_page", "columns", "each", "most", "mass", "width",
)  # fmt: skip
JOB = np.dtype([*((name, "i8") for name in INTEGERS), ("scale", "f4")])


def launch(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    keys: Tensor,
    *,
    columns: int,
    split: bool = False,
    channels: Tensor | None = None,
    scale: float,
) -> Tensor:
    """For blocks of one query. keys [G, P, ...]: of each page, for each of its columns, c keys, any c. Their numbers
    belong to a query's; with `split` to those of a query that are negative, and zeros, then those that are not; with
    channels [G, r] to these of a query, and to none where it is -1."""
    q_kind, q_token, q_head = rows_of(q)
    dim = q.shape[2] * 2 if split else q.shape[2] if channels is None else channels.shape[1]
    each, size = keys[0, 0].numel() // (columns * dim), keys.element_size()
    mass = torch.empty(len(kv.heads), len(blocks), kv.table.shape[1] * columns)
    taken, channels = torch.zeros(1, dtype=torch.int64), None if channels is None else channels.contiguous()
    most = max((row.pos for row in blocks.rows), default=0) // kv.page_size * columns
    work = job(
        JOB, next=taken, items=len(kv.heads) * len(blocks), blocks=len(blocks), groups=len(kv.heads), seq=blocks.seq,
        token=blocks.token, pos=blocks.pos, heads=kv.heads, ratio=kv.ratio, size=blocks.size, page_size=kv.page_size,
        table=kv.table, table_row=kv.table.stride(0), q=q, q_kind=q_kind, q_token=q_token, q_head=q_head,
        q_dim=q.shape[2], split=split, channels=channels, dim=dim, keys=keys, key_head=keys.stride(0) * size,
        key_page=keys.stride(1) * size, columns=columns, each=each, most=most, mass=mass, width=mass.shape[2],
        scale=scale,
    )  # fmt: skip
    run(score(kind_of(keys)), work)
    return mass


@functools.cache
def score(kind: str) -> Body:
    size, add_products, turned = SIZES[kind], add_products_of(kind), kind == "bfloat16"

    @njit(error_model="numpy")
    def multiply_keys(q, dim, keys, at, listed, scores):
        """q: address of [4, dim]; at [listed, and as many again at most as are next; and three more]: distances of keys
        from the first -> scores [listed, 4]."""
        for i in range(0, listed, FOUR):
            tile = zeros()
            for j in range(0, dim, LANES):
                x = keys + size * j
                tile = add_products(tile, q + 4 * j, 4 * dim, x + at[i], x + at[i + 1], x + at[i + 2], x + at[i + 3])
            if i + KEYS < listed:
                for key in range(i + KEYS, i + KEYS + FOUR):
                    for line in range(0, size * dim, LINE):
                        prefetch(keys + at[key] + line)
            store(scores + 16 * i, totals(tile))

    @njit(error_model="numpy")
    def score_pages(work, q, keys, table, first, last, at, scores, to):
        """The largest products of each column of some pages [..., 4], to `to`."""
        listed, of_page = 0, work.columns * work.each
        for page in range(first, last):
            begin = max(table[page], 0) * work.key_page
            for key in range(of_page):
                at[listed] = begin + key * work.dim * size
                listed += 1
        for i in range(FOUR):
            at[listed + i] = at[0]
        if work.each == 1:
            multiply_keys(q, work.dim, keys, at, listed, to)
        else:
            multiply_keys(q, work.dim, keys, at, listed, scores)
            _largest_of(scores, listed, work.each, to)

    def body(address):
        work = carray(address, 1)[0]
        dim, columns = work.dim, work.columns
        room_for = work.most + 2 * LANES  # columns
        room = np.empty(FOUR * (work.q_dim + dim) + 5 * room_for + FOUR * (LISTED + FOUR) + 2 * LANES, np.float32)
        q = room.ctypes.data // 64 * 64 + 64
        whole = q + 4 * FOUR * dim
        found = whole + 4 * FOUR * work.q_dim
        largest = found + 16 * room_for
        scores = largest + 4 * room_for
        at = np.empty(LISTED + FOUR, np.int64)
        turns = turned and dim <= SHORT and work.each == 1 and columns % LANES == 0
        pages = max(1, LISTED // (columns * work.each))
        while True:
            item = take(work.next)
            if item >= work.items:
                room[0] = 0  # Numba frees it after the last use that it sees
                return
            n, g = item % work.blocks, item // work.blocks
            past = np.int64(carray(int32_at(work.pos), work.blocks)[n]) // work.size * work.size // work.page_size
            table = carray(int32_at(work.table + 4 * work.table_row * carray(int32_at(work.seq), work.blocks)[n]), past)
            keys = work.keys + g * work.key_head
            for row in range(0, work.ratio, FOUR):
                _read(work, item, row, whole, q)
                for first in range(0, past, pages):
                    last = min(first + pages, past)
                    to = found + 16 * first * columns
                    if turns:
                        _score_turned(q, dim, keys, work.key_page, table, first, last, columns, to)
                    else:
                        score_pages(work, q, keys, table, first, last, at, scores, to)
                    for page in range(first, last):
                        if table[page] < 0:
                            for i in range(FOUR * columns * page, FOUR * columns * (page + 1)):
                                store_number(found + 4 * i, LOWEST)
                _share(found, past * columns, work.ratio - row, largest, row == 0)
            _write(work, item, largest, past * columns)

    return compiled(JOB, body)


@njit(error_model="numpy")
def _score_turned(q, dim, keys, step, table, first, last, columns, to):
    """Products of four queries with the keys of some pages, in bfloat16, one for each column."""
    row = 2 * dim
    for page in range(first, last):
        own, then = keys + max(table[page], 0) * step, keys + max(table[min(page + 1, last - 1)], 0) * step
        for column in range(0, columns, LANES):
            for line in range(row * column, row * (column + LANES), LINE):
                prefetch(then + line)
            sums = four_zeros()
            for j in range(0, dim, LANES):
                sums = add_products_with_sixteen(sums, q + 4 * j, 4 * dim, own + row * column + 2 * j, row)
            found = by_key(sums)
            store(to, found[0])
            store(to + 64, found[1])
            store(to + 128, found[2])
            store(to + 192, found[3])
            to += 256


@njit(error_model="numpy")
def _read(work, item, row, whole, q):
    """q: address of four queries [4, dim] to multiply keys with; whole: of room for them as they are."""
    n, g, dim = item % work.blocks, item // work.blocks, work.q_dim
    head = carray(int32_at(work.heads), work.groups)[g] * work.ratio + row
    at = work.q + carray(int32_at(work.token), work.blocks)[n] * work.q_token + head * work.q_head
    plain = work.split == 0 and work.channels == 0
    read_queries(q if plain else whole, at, work.q_kind, work.q_head, work.ratio - row, dim, work.scale)
    if plain:
        return
    queries, own = carray(float32_at(whole), (FOUR, dim)), carray(float32_at(q), (FOUR, work.dim))
    channels = carray(int32_at(work.channels + 4 * g * work.dim), work.dim)
    for r in range(FOUR):
        for j in range(work.dim):
            if work.split == 0:
                own[r, j] = queries[r, channels[j]] if channels[j] >= 0 else np.float32(0)
            else:
                number = queries[r, j % dim]
                own[r, j] = number if (number < 0) == (j < dim) else np.float32(0)


@njit(error_model="numpy")
def _largest_of(scores, count, each, to):
    """scores [count, 4] -> [count / each, 4], of neighbours the largest."""
    x, y = carray(float32_at(scores), (count, FOUR)), carray(float32_at(to), (count // each, FOUR))
    for column in range(count // each):
        for r in range(FOUR):
            most = x[column * each, r]
            for i in range(column * each + 1, (column + 1) * each):
                most = max(most, x[i, r])
            y[column, r] = most


@njit(error_model="numpy")
def _share(scores, count, real, largest, new):
    """scores [count, 4], with room to a multiple of 16 columns: the softmaxes of the first `real` queries; of each
    column the largest of them, and of what is there already unless `new`, to largest [count]."""
    whole = (count + LANES - 1) // LANES * LANES
    for i in range(FOUR * count, FOUR * whole):
        store_number(scores + 4 * i, LOWEST)
    most = splat(FLOOR)
    for i in range(0, whole, FOUR):
        most = larger(most, load(scores + 16 * i))
    most = largest_over_keys(most)
    total = splat(np.float32(0))
    for i in range(0, whole, FOUR):
        weight = exp(subtract(load(scores + 16 * i), most))
        total = add(total, weight)
        store(scores + 16 * i, weight)
    part = of_queries(divide(splat(np.float32(1)), larger(sum_over_keys(total), splat(TINY))), real)
    for i in range(0, whole, LANES):
        a, b = multiply(load(scores + 16 * i), part), multiply(load(scores + 16 * (i + 4)), part)
        c, d = multiply(load(scores + 16 * (i + 8)), part), multiply(load(scores + 16 * (i + 12)), part)
        found = largest_of_queries(a, b, c, d)
        store(largest + 4 * i, found if new else larger(found, load(largest + 4 * i)))


@njit(error_model="numpy")
def _write(work, item, largest, count):
    """The shares of `count` columns, made to add up to 1, and zeros behind them."""
    lanes = splat(np.float32(0))
    for i in range(0, count, LANES):
        lanes = add(lanes, load(largest + 4 * i))
    behind = largest + 4 * ((count + LANES - 1) // LANES * LANES)
    store(behind, lanes)
    total = np.float64(0)
    for share in carray(float32_at(behind), LANES):
        total += share
    factor = np.float32(1 / total) if total > 0 else np.float32(0)
    shares, to = carray(float32_at(largest), count), carray(float32_at(work.mass + 4 * item * work.width), work.width)
    for i in range(count):
        to[i] = shares[i] * factor
    for i in range(count, work.width):
        to[i] = 0
