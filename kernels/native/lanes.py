"""Sixteen numbers at once in code that Numba compiles: a type, and the operations that kernels are made of.

Left to itself LLVM sums across lanes for every product; with these a kernel says what lies side by side. Each becomes
one instruction of AVX-512, two of AVX2 or four of NEON. Addresses are whole numbers, in bytes, and need no alignment.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
FLOAT, INT = ir.FloatType(), ir.IntType(32)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
FAST = ("nnan", "nsz", "arcp", "contract", "afn", "reassoc")

Value = Any  # of LLVM


class _Lanes(types.Type):
    """LANES numbers of float32."""

    def __init__(self) -> None:
        super().__init__(name="lanes")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, declared: Any) -> None:
        super().__init__(manager, declared, FLOATS)


lanes = _Lanes()


def spread(build: ir.IRBuilder, number: Value) -> Value:
    """A number in all lanes."""
    nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    return shuffled(build, build.insert_element(nothing, number, ir.Constant(INT, 0)), nothing, [0] * LANES)


def shuffled(build: ir.IRBuilder, x: Value, y: Value, order: Sequence[int]) -> Value:
    """Lanes of x, and from LANES on of y."""
    return build.shuffle_vector(x, y, ir.Constant(INTS, list(order)))


def called(build: ir.IRBuilder, name: str, *operands: Value) -> Value:
    """One of LLVM's functions from lanes to lanes."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * len(operands))
    return build.call(cgutils.get_or_insert_function(build.module, kind, f"llvm.{name}.v{LANES}f32"), operands)


def loaded(build: ir.IRBuilder, at: Value, kind: ir.Type, align: int) -> Value:
    value = build.load(build.inttoptr(at, kind.as_pointer()))
    value.align = align
    return value


def stored(build: ir.IRBuilder, value: Value, at: Value, align: int) -> None:
    build.store(value, build.inttoptr(at, value.type.as_pointer())).align = align


def _float32(build: ir.IRBuilder, at: Value) -> Value:
    return loaded(build, at, FLOATS, 4)


def _float16(build: ir.IRBuilder, at: Value) -> Value:
    return build.fpext(loaded(build, at, ir.VectorType(ir.HalfType(), LANES), 2), FLOATS)


def _bfloat16(build: ir.IRBuilder, at: Value) -> Value:
    short = loaded(build, at, ir.VectorType(ir.IntType(16), LANES), 2)
    return build.bitcast(build.shl(build.zext(short, INTS), _whole(16)), FLOATS)


def _to_float32(build: ir.IRBuilder, x: Value, at: Value) -> None:
    stored(build, x, at, 4)


def _to_float16(build: ir.IRBuilder, x: Value, at: Value) -> None:
    stored(build, build.fptrunc(x, ir.VectorType(ir.HalfType(), LANES)), at, 2)


def _to_bfloat16(build: ir.IRBuilder, x: Value, at: Value) -> None:
    bits = build.bitcast(x, INTS)
    odd = build.and_(build.lshr(bits, _whole(16)), _whole(1))  # to the even neighbour from half way
    rounded = build.lshr(build.add(bits, build.add(odd, _whole(0x7FFF))), _whole(16))
    stored(build, build.trunc(rounded, ir.VectorType(ir.IntType(16), LANES)), at, 2)


LOADS = {"float32": _float32, "float16": _float16, "bfloat16": _bfloat16}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes
STORES = {"float32": _to_float32, "float16": _to_float16, "bfloat16": _to_bfloat16}


def load_of(kind: str) -> Any:
    """Reads LANES numbers of that dtype from an address."""
    read = LOADS[kind]

    @intrinsic
    def load(typing, at):
        return lanes(types.int64), lambda context, build, sig, x: read(build, x[0])

    return load


def store_of(kind: str) -> Any:
    """Writes lanes to an address, in that dtype."""
    write = STORES[kind]

    @intrinsic
    def store(typing, at, numbers):
        def generate(context, build, sig, x):
            write(build, x[1], x[0])
            return context.get_dummy_value()

        return types.void(types.int64, lanes), generate

    return store


load, store = load_of("float32"), store_of("float32")


@intrinsic
def splat(typing, number):
    return lanes(types.float32), lambda context, build, sig, x: spread(build, x[0])


@intrinsic
def store_number(typing, at, number):
    """One number, to an address."""

    def generate(context, build, sig, x):
        stored(build, x[1], x[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


def _binary(join: Callable[[ir.IRBuilder, Value, Value], Value]) -> Any:
    @intrinsic
    def operation(typing, x, y):
        return lanes(lanes, lanes), lambda context, build, sig, x: join(build, x[0], x[1])

    return operation


def _sum(build: ir.IRBuilder, x: Value, y: Value) -> Value:
    return build.fadd(x, y, flags=FAST)


def _largest(build: ir.IRBuilder, x: Value, y: Value) -> Value:
    return called(build, "maxnum", x, y)


add, larger = _binary(_sum), _binary(_largest)
subtract = _binary(lambda build, x, y: build.fsub(x, y))
multiply = _binary(lambda build, x, y: build.fmul(x, y))
divide = _binary(lambda build, x, y: build.fdiv(x, y))
smaller = _binary(lambda build, x, y: called(build, "minnum", x, y))


def _over_keys(join: Callable[[ir.IRBuilder, Value, Value], Value]) -> Any:
    """Joins lanes that belong to one of four queries, n, n + 4, n + 8 and n + 12; all of them get the result."""

    @intrinsic
    def operation(typing, x):
        def generate(context, build, sig, x):
            once = join(build, x[0], shuffled(build, x[0], x[0], [k ^ 8 for k in range(LANES)]))
            return join(build, once, shuffled(build, once, once, [k ^ 4 for k in range(LANES)]))

        return lanes(lanes), generate

    return operation


sum_over_keys, largest_over_keys = _over_keys(_sum), _over_keys(_largest)


@intrinsic
def largest_of_queries(typing, a, b, c, d):
    """Four times four keys of four queries -> for each key the largest of its four."""

    def generate(context, build, sig, x):
        folded = []
        for each in x:
            once = _largest(build, each, shuffled(build, each, each, [k ^ 1 for k in range(LANES)]))
            folded.append(_largest(build, once, shuffled(build, once, once, [k ^ 2 for k in range(LANES)])))
        half = [0, 4, 8, 12, LANES, LANES + 4, LANES + 8, LANES + 12] * 2
        low, high = (shuffled(build, x, y, half) for x, y in (folded[:2], folded[2:]))
        return shuffled(build, low, high, [*range(8), *range(LANES, LANES + 8)])

    return lanes(lanes, lanes, lanes, lanes), generate


@intrinsic
def of_queries(typing, x, count):
    """x for the first `count` of four queries, and 0 for the others."""

    def generate(context, build, sig, x):
        query = ir.Constant(INTS, [k % 4 for k in range(LANES)])
        known = build.icmp_signed("<", query, spread(build, build.trunc(x[1], INT)))
        return build.select(known, x[0], _number(0.0))

    return lanes(lanes, types.int64), generate


@intrinsic
def exp(typing, x):
    """e ** x to a part in 10 million, 0 below -88, for x of at most 88."""

    def generate(context, build, sig, x):
        power = _largest(build, build.fmul(x[0], _number(math.log2(math.e))), _number(-127.0))
        whole = called(build, "rint", power)
        rest = build.fsub(power, whole)
        # Taylor's series of 2 ** rest; at 1/2 the first term that is left out is below 2 ** -27
        found = _number(math.log(2) ** 7 / math.factorial(7))
        for n in range(6, -1, -1):
            found = called(build, "fma", found, rest, _number(math.log(2) ** n / math.factorial(n)))
        two = build.shl(build.add(build.fptosi(whole, INTS), _whole(127)), _whole(23))
        return build.fmul(found, build.bitcast(two, FLOATS))

    return lanes(lanes), generate


@intrinsic
def prefetch(typing, at):
    """Asks for the line of memory that holds this address."""

    def generate(context, build, sig, x):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
        function = cgutils.get_or_insert_function(build.module, kind, "llvm.prefetch.p0")
        read, near, data = (ir.Constant(INT, number) for number in (0, 2, 1))
        build.call(function, [build.inttoptr(x[0], byte), read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _number(number: float) -> ir.Constant:
    return ir.Constant(FLOATS, [number] * LANES)


def _whole(number: int) -> ir.Constant:
    return ir.Constant(INTS, [number] * LANES)
