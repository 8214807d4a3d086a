"""Sixteen registers of sixteen numbers: what four queries and four keys, or four queries and 64 channels, come to."""

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.native.lanes import (
    FAST,
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    LOADS,
    SIZES,
    Value,
    called,
    lanes,
    loaded,
    shuffled,
    spread,
    stored,
)

FOUR = 4  # queries, and keys or registers of channels


def _tile(registers: int) -> Any:
    return types.UniTuple(lanes, registers)


def _listed(build: ir.IRBuilder, tile: Value) -> list[Value]:
    return [build.extract_value(tile, n) for n in range(tile.type.count)]


def _packed(build: ir.IRBuilder, registers: list[Value]) -> Value:
    tile = ir.Constant(ir.ArrayType(FLOATS, len(registers)), ir.Undefined)
    for n, register in enumerate(registers):
        tile = build.insert_value(tile, register, n)
    return tile


def _plus(build: ir.IRBuilder, address: Value, step: Value, times: int) -> Value:
    return build.add(address, build.mul(step, ir.Constant(step.type, times)))


@intrinsic
def zeros(typing):
    """A tile for products."""
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    return _tile(FOUR * FOUR)(), lambda context, build, sig, x: _packed(build, [zero] * FOUR * FOUR)


def add_products_of(kind: str) -> Any:
    """LANES channels of the products of four queries, float32, with four keys of that dtype."""
    read = LOADS[kind]

    @intrinsic
    def add_products(typing, tile, query, row, a, b, c, d):
        """query: address of the first of four, `row` bytes from one to the next; a ... d: of the keys."""

        def generate(context, build, sig, x):
            registers = _listed(build, x[0])
            queries = [loaded(build, _plus(build, x[1], x[2], n), FLOATS, 4) for n in range(FOUR)]
            for k, at in enumerate(x[3:]):
                key = read(build, at)
                for n, query in enumerate(queries):
                    registers[k * FOUR + n] = called(build, "fma", query, key, registers[k * FOUR + n])
            return _packed(build, registers)

        return _tile(FOUR * FOUR)(_tile(FOUR * FOUR), *[types.int64] * 6), generate

    return add_products


@intrinsic
def totals(typing, tile):
    """Sums over each register of a tile of products -> the four products of the first key, of the second, ..."""

    def generate(context, build, sig, x):
        sums = _listed(build, x[0])
        fours = range(0, LANES, 4)
        steps = (
            ([n + k for n in fours for k in (0, LANES, 1, LANES + 1)], 2),
            ([n + k for n in fours for k in (0, 1, LANES, LANES + 1)], 2),  # now a four holds one number of each query
            ([*range(8), *range(LANES, LANES + 8)], 8),
            ([n + k for n in range(0, 2 * LANES, 8) for k in range(4)], 4),  # ... and is of one key
        )
        for low, step in steps:
            high = [k + step for k in low]
            pairs = list(zip(sums[::2], sums[1::2], strict=True))
            sums = [build.fadd(shuffled(build, *p, low), shuffled(build, *p, high), flags=FAST) for p in pairs]
        return sums[0]

    return lanes(_tile(FOUR * FOUR)), generate


def load_scaled_of(width: int) -> Any:
    """A tile of LANES * width channels of four sums."""

    @intrinsic
    def load_scaled(typing, at, row, factors):
        """The sums begin at `at`, `row` bytes from one to the next; each is multiplied by one of the first factors."""

        def generate(context, build, sig, x):
            registers = []
            for n in range(FOUR):
                factor = shuffled(build, x[2], x[2], [n] * LANES)
                for w in range(width):
                    sums = loaded(build, _channels(build, x[0], x[1], n, w), FLOATS, 4)
                    registers.append(build.fmul(sums, factor))
            return _packed(build, registers)

        return _tile(FOUR * width)(types.int64, types.int64, lanes), generate

    return load_scaled


@intrinsic
def store_tile(typing, tile, at, row):
    """What load_scaled read, and what came to it."""

    def generate(context, build, sig, x):
        registers = _listed(build, x[0])
        width = len(registers) // FOUR
        for n in range(FOUR):
            for w in range(width):
                stored(build, registers[n * width + w], _channels(build, x[1], x[2], n, w), 4)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), generate


def _channels(build: ir.IRBuilder, at: Value, row: Value, query: int, register: int) -> Value:
    return build.add(_plus(build, at, row, query), ir.Constant(at.type, register * LANES * 4))


def add_weighted_of(kind: str) -> Any:
    """A key's value, of that dtype, added to four sums with four weights."""
    read, size = LOADS[kind], SIZES[kind]

    @intrinsic
    def add_weighted(typing, tile, weights, value):
        """weights: address of four float32; value: address of the channels."""

        def generate(context, build, sig, x):
            registers = _listed(build, x[0])
            width = len(registers) // FOUR
            four = ir.Constant(x[1].type, 4)
            factors = [spread(build, loaded(build, _plus(build, x[1], four, n), FLOAT, 4)) for n in range(FOUR)]
            for w in range(width):
                channels = read(build, build.add(x[2], ir.Constant(x[2].type, w * LANES * size)))
                for n, factor in enumerate(factors):
                    registers[n * width + w] = called(build, "fma", factor, channels, registers[n * width + w])
            return _packed(build, registers)

        return tile(tile, types.int64, types.int64), generate

    return add_weighted


@intrinsic
def add_products_with_sixteen(typing, sums, query, row, keys, step):
    """sums: four registers, of each of four queries its products with sixteen keys; to which LANES channels are added.
    query: address of the first, float32, `row` bytes from one to the next; keys: of the first, bfloat16, with `step`.

    Sums across lanes would be most of the work where keys are short, so the keys are turned first: until each register
    has one pair of channels of all keys.
    """

    def generate(context, build, sig, x):
        registers, half = _listed(build, x[0]), ir.VectorType(INT, LANES // 2)
        read = []
        for n in range(0, LANES, 2):
            two = (loaded(build, _plus(build, x[3], x[4], key), half, 2) for key in (n, n + 1))
            read.append(build.shuffle_vector(*two, ir.Constant(INTS, list(range(LANES)))))
        for c, pair in enumerate(_turned(build, read)):
            lower = build.shl(pair, ir.Constant(INTS, [16] * LANES))
            upper = build.and_(pair, ir.Constant(INTS, [-(1 << 16)] * LANES))
            for channel, numbers in ((2 * c, lower), (2 * c + 1, upper)):
                for n in range(FOUR):
                    at = build.add(_plus(build, x[1], x[2], n), ir.Constant(x[1].type, 4 * channel))
                    factor = spread(build, loaded(build, at, FLOAT, 4))
                    registers[n] = called(build, "fma", factor, build.bitcast(numbers, FLOATS), registers[n])
        return _packed(build, registers)

    return sums(sums, *[types.int64] * 4), generate


@intrinsic
def by_key(typing, sums):
    """Of each of four queries a number for each of sixteen keys -> the four numbers of four keys in each register."""
    return sums(sums), lambda context, build, sig, x: _packed(build, _by_key(build, _listed(build, x[0])))


@intrinsic
def four_zeros(typing):
    """Four registers."""
    return _tile(FOUR)(), lambda context, build, sig, x: _packed(build, [ir.Constant(FLOATS, [0.0] * LANES)] * FOUR)


def _turned(build: ir.IRBuilder, registers: list[Value]) -> list[Value]:
    """Eight pairs of one key and of the next in each of eight registers -> one pair of all sixteen keys in each."""
    rows, place = [registers], lambda pair, key: LANES // 2 * key + pair
    for width in (4, 8, 16):  # keys of a register
        pairs, half = LANES // width, width // 2
        turned = []
        for row in rows:
            for first in (0, pairs):
                own = itertools.product(range(first, first + pairs), range(width))
                order = [place(pair, key % half) + LANES * (key // half) for pair, key in own]
                turned.append([shuffled(build, a, b, order) for a, b in zip(row[::2], row[1::2], strict=True)])
        rows, place = turned, _by_pair(width)
    return [register for (register,) in rows]


def _by_key(build: ir.IRBuilder, sums: list[Value]) -> list[Value]:
    found = []
    for low in (0, 8):
        order = [k + lane for k in range(low, low + 8) for lane in (0, LANES)]
        first, last = shuffled(build, sums[0], sums[1], order), shuffled(build, sums[2], sums[3], order)
        for key in (0, 8):
            both = [k + lane for k in range(key, key + 8, 2) for lane in (0, 1, LANES, LANES + 1)]
            found.append(shuffled(build, first, last, both))
    return found


def _by_pair(width: int) -> Callable[[int, int], int]:
    return lambda pair, key: width * pair + key
