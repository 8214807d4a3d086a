"""FP8 keys and values inside kernels: bytes that are widened to the queries' type. Scales belong to whole rows, so they
multiply scores and weights and never single numbers."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.fp8 import LARGEST, LEAST
from gossamer.kernels.layout import PagedKV
from gossamer.kernels.triton.tiles import add_keys, capability

WHOLE, CHIP, BITS = 0, 1, 2  # how numbers are widened: not at all, by the chip, or by integer arithmetic
FIRST_CHIP = 89  # the first that knows this FP8
_LARGEST, _LEAST = tl.constexpr(LARGEST), tl.constexpr(LEAST)


class Stored(NamedTuple):
    """Keys and values as a kernel gets them."""

    k: Tensor  # [G, P, S, D]; FP8 as int8
    v: Tensor
    scale: Tensor  # [2, G, P, S], or anything where there is none
    strides: tuple[int, int, int]  # of `scale`: from keys to values, of a head, of a page
    form: int  # WHOLE, CHIP or BITS
    itemsize: int  # of the numbers that are multiplied


def stored(q: Tensor, kv: PagedKV) -> Stored:
    """For queries q, to whose type FP8 is widened."""
    if kv.scale is None:
        return Stored(kv.k, kv.v, kv.heads, (0, 0, 0), WHOLE, kv.k.element_size())
    between, head, page, _ = kv.scale.stride()
    form = form_for(q.dtype, q.device)
    return Stored(kv.k.view(torch.int8), kv.v.view(torch.int8), kv.scale, (between, head, page), form, q.element_size())


def form_for(dtype: torch.dtype, device: torch.device) -> int:
    """How FP8 becomes `dtype`. float16 has the same bits in other places, and weights times scales as they are with
    BITS, about 1, do not leave its range."""
    return BITS if dtype == torch.float16 or capability(device) < FIRST_CHIP else CHIP


@triton.jit
def widen(x, dtype: tl.constexpr, FP8: tl.constexpr):
    """Bytes -> numbers of `dtype`, with BITS over 256."""
    if FP8 == 2:
        # The exponent is a float16's less 8, the sign moves over the free place between them.
        x = ((x.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True).to(dtype)
    else:
        x = x.to(tl.float8e4nv, bitcast=True).to(dtype)
    return x


@triton.jit
def load_scales(ptr, there, ROWS: tl.constexpr, FP8: tl.constexpr):
    """float32 [N] for what `widen` gives; 0 where not `there` (when ROWS)."""
    scale = (tl.load(ptr, mask=there, other=0.0) if ROWS else tl.load(ptr)).to(tl.float32)
    if FP8 == 2:
        scale *= 256.0
    return scale


@triton.jit
def add_fp8_keys(
    q, k, v, scales, scales_v, there, best, total, acc, visible, scale, cap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """As tiles.add_keys, for bytes whose scales are at `scales` [N], the values' scales_v behind, where `there` [N]
    (when MASKED)."""
    k_scale = load_scales(scales, there, MASKED, FP8)
    v_scale = load_scales(scales + scales_v, there, MASKED, FP8)
    k, v = widen(k, q.dtype, FP8), widen(v, q.dtype, FP8)
    return add_keys(q, k, v, best, total, acc, visible, scale, cap, MASKED, SOFTCAP, k_scale, v_scale, True)


@triton.jit
def quantise(x):
    """As gossamer.kernels.fp8.quantise: x [N, D] float32 -> bytes [N, D] int8, scales [N] float32."""
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    bits = tl.maximum(tl.div_rn(largest, _LARGEST), _LEAST).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & -65536  # a bfloat16, as the interpreter would not round it
    scale = tl.where(largest < float("inf"), bits.to(tl.float32, bitcast=True), float("nan"))
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    sign, size = x.to(tl.int32, bitcast=True) >> 24 & 0x80, tl.abs(x).to(tl.int32, bitcast=True)
    code = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - 960  # to the nearest, ties to even; the exponent's zero moves
    # Below 2^-6 it is a number of 2^-9, which adding 2^14 rounds to.
    few = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(size < 0x3C800000, few, code), 126)
    return (code | sign).to(tl.int8), scale
