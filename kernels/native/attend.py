"""Attention of four queries to a list of keys, some at a time: the sums behind them, in compiled code.

While one set of rows is computed on, the next is fetched: what a core waits for is memory, which does not foresee where
the keys of another page lie.
"""

from typing import Any

import numpy as np
from numba import njit

from gossamer.kernels.native.lanes import (
    LANES,
    SIZES,
    add,
    divide,
    exp,
    larger,
    largest_over_keys,
    load,
    multiply,
    prefetch,
    smaller,
    splat,
    store,
    store_number,
    subtract,
    sum_over_keys,
)
from gossamer.kernels.native.tile import (
    FOUR,
    add_products_of,
    add_weighted_of,
    load_scaled_of,
    store_tile,
    totals,
    zeros,
)

LOWEST = np.float32(-1e30)  # below any score, and a number still when another is taken from it
KEYS = 64  # at once: their rows, and those that come next, fit into a core's first cache
LINE = 64  # bytes that memory gives at a time
WIDE = 4  # registers of channels that are summed at once

_number = np.float32
_load_wide, _load_narrow = load_scaled_of(WIDE), load_scaled_of(1)


@njit(error_model="numpy")
def _capped(scores, cap):
    """cap * tanh(scores / cap)"""
    twice = smaller(multiply(scores, splat(_number(2) / cap)), splat(_number(80)))
    return multiply(
        splat(cap), subtract(splat(_number(1)), divide(splat(_number(2)), add(exp(twice), splat(_number(1)))))
    )


@njit(error_model="numpy")
def _weigh(scores, count, best, total):
    """Scores [count, 4], count a multiple of four -> their exponentials relative to the best so far; `best` and
    `total` [4 times 4] are brought up to date. Returns how much what was summed before counts still."""
    most = splat(LOWEST)
    for i in range(0, count, FOUR):
        most = larger(most, load(scores + 16 * i))
    before = load(best)
    most = larger(before, largest_over_keys(most))
    left = exp(subtract(before, most))
    weights = splat(_number(0))
    for i in range(0, count, FOUR):
        weight = exp(subtract(load(scores + 16 * i), most))
        weights = add(weights, weight)
        store(scores + 16 * i, weight)
    store(best, most)
    store(total, add(multiply(load(total), left), sum_over_keys(weights)))
    return left


def attend_of(kind: str) -> Any:
    """For keys and values of that dtype."""
    size, add_products, add_weighted = SIZES[kind], add_products_of(kind), add_weighted_of(kind)

    @njit(error_model="numpy")
    def attend(q, keys, values, at, first, last, dim, cap, scores, best, total, sums):
        """Adds the keys first ... last - 1 (at most KEYS) of a list to what four queries found so far.

        Addresses: q [4, dim], times the scale; keys, values, where the first of all begins; scores [KEYS, 4], to work
        in; best, total [4 times 4]; sums [4, dim]. All float32, but for keys and values. at: of each key of the list
        its distance from the first of all in bytes, and four of any kind behind the last."""
        row, count = 4 * dim, last - first
        for i in range(0, count, FOUR):
            own = at[first + i : first + i + FOUR]
            tile = zeros()
            for j in range(0, dim, LANES):
                x = keys + size * j
                tile = add_products(tile, q + 4 * j, row, x + own[0], x + own[1], x + own[2], x + own[3])
            for key in range(FOUR):
                for line in range(0, size * dim, LINE):
                    prefetch(values + own[key] + line)
            found = totals(tile)
            store(scores + 16 * i, _capped(found, cap) if cap > 0 else found)
        whole = (count + FOUR - 1) // FOUR * FOUR
        for i in range(FOUR * count, FOUR * whole):
            store_number(scores + 4 * i, LOWEST)
        left = _weigh(scores, whole, best, total)
        ahead = min(len(at) - FOUR, last + KEYS) - last
        for j in range(0, dim - WIDE * LANES + 1, WIDE * LANES):
            tile = _load_wide(sums + 4 * j, row, left)
            for i in range(count):
                if i < ahead:
                    for line in range(0, size * WIDE * LANES, LINE):
                        prefetch(keys + at[last + i] + size * j + line)
                tile = add_weighted(tile, scores + 16 * i, values + at[first + i] + size * j)
            store_tile(tile, sums + 4 * j, row)
        for j in range(dim - dim % (WIDE * LANES), dim, LANES):
            tile = _load_narrow(sums + 4 * j, row, left)
            for i in range(count):
                tile = add_weighted(tile, scores + 16 * i, values + at[first + i] + size * j)
            store_tile(tile, sums + 4 * j, row)

    return attend
