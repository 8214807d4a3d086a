"""One program per (page, head), or per part of one: a page's keys are read once, its summary is written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.page_summaries import turn_back
from gossamer.kernels.triton.fp8 import WHOLE, form_for, load_scales, widen

TURNED_PAGES = 1024  # pages whose cosines and sines are in memory at once: 32 MiB for 128 turned dimensions
PAIRS = 32  # pairs of turned dimensions that one program undoes


def launch_means(pool: Tensor, physical: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """As gossamer.kernels.page_summaries.page_means."""
    numbers, scales, strides, form = _stored(pool, physical, scale)
    _means[(physical.numel(), pool.shape[0])](
        numbers, physical, scales, out, *pool.stride()[:3], *strides, *out.stride()[:2],
        PAGE=pool.shape[2], DIM=pool.shape[3], WIDE=triton.next_power_of_2(pool.shape[3]), FP8=form,
        enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
    )  # fmt: skip


def launch_bounds(pool: Tensor, physical: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """As gossamer.kernels.page_summaries.page_bounds."""
    numbers, scales, strides, form = _stored(pool, physical, scale)
    parts = out.shape[2]
    _bounds[(physical.numel(), pool.shape[0], parts)](
        numbers, physical, scales, out, *pool.stride()[:3], *strides, *out.stride()[:2],
        PART=pool.shape[2] // parts, DIM=pool.shape[3], WIDE=triton.next_power_of_2(pool.shape[3]), FP8=form,
        enable_fp_fusion=True,
    )  # fmt: skip


def launch_labels(pool: Tensor, physical: Tensor, channels: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """As gossamer.kernels.page_summaries.page_labels."""
    numbers, scales, strides, form = _stored(pool, physical, scale)
    taken = channels.shape[1]
    _labels[(physical.numel(), pool.shape[0])](
        numbers, physical, channels, scales, out, *pool.stride()[:3], *strides, *channels.stride(), *out.stride()[:2],
        PAGE=pool.shape[2], TAKEN=taken, WIDE=triton.next_power_of_2(taken), FP8=form,
        enable_fp_fusion=True,
    )  # fmt: skip


def launch_pools(
    pool: Tensor,
    physical: Tensor,
    first: Tensor,
    inv_freq: Tensor,
    scaling: float,
    out: Tensor,
    scale: Tensor | None = None,
) -> None:
    """As gossamer.kernels.page_summaries.page_pools."""
    numbers, scales, strides, form = _stored(pool, physical, scale)
    dim, turned = pool.shape[3], inv_freq.numel()
    programs = triton.cdiv(max(turned, dim - 2 * turned), PAIRS)
    for pages, begins in zip(physical.split(TURNED_PAGES), first.split(TURNED_PAGES), strict=True):
        cos, sin = turn_back(begins, inv_freq, scaling, pool.shape[2])
        _pools[(pages.numel(), pool.shape[0], programs)](
            numbers, pages, cos, sin, scales, out, *pool.stride()[:3], *strides, *out.stride()[:2],
            PAGE=pool.shape[2], DIM=dim, TURNED=turned, PAIRS=PAIRS, FP8=form,
            enable_fp_fusion=True,
        )  # fmt: skip


def _stored(pool: Tensor, physical: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, int], int]:
    """What a kernel gets of the pool: numbers, scales with their strides of a head and of a page, and how to widen."""
    if scale is None:
        return pool, physical, (0, 0), WHOLE
    head, page, _ = scale.stride()
    return pool.view(torch.int8), scale, (head, page), form_for(torch.float32, pool.device)


@triton.jit
def _load(ptrs, mask, scales, FP8: tl.constexpr):
    """Keys [n, WIDE] with their scales at `scales` [n] -> float32, 0 where not `mask`."""
    keys = tl.load(ptrs, mask=mask, other=0)
    if FP8:
        keys = widen(keys, tl.float32, FP8) * load_scales(scales, mask, False, FP8)[:, None]
    return keys.to(tl.float32)


@triton.jit
def _means(
    pool_ptr, physical_ptr, scales_ptr, out_ptr, pool_g, pool_p, pool_s, scales_g, scales_p, out_g, out_p,
    PAGE: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    page, g = tl.load(physical_ptr + tl.program_id(0)).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page < 0:
        return
    s, d = tl.arange(0, PAGE).to(tl.int64), tl.arange(0, WIDE)
    real = d < DIM
    ptrs = pool_ptr + g * pool_g + page * pool_p + (s * pool_s)[:, None] + d[None]
    mean = tl.sum(_load(ptrs, real[None], scales_ptr + g * scales_g + page * scales_p + s, FP8), 0) / PAGE
    tl.store(out_ptr + g * out_g + page * out_p + d, mean.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _bounds(
    pool_ptr, physical_ptr, scales_ptr, out_ptr, pool_g, pool_p, pool_s, scales_g, scales_p, out_g, out_p,
    PART: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    page, g = tl.load(physical_ptr + tl.program_id(0)).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page < 0:
        return
    part = tl.program_id(2)
    s, d = (part * PART + tl.arange(0, PART)).to(tl.int64), tl.arange(0, WIDE)
    real = d < DIM
    ptrs = pool_ptr + g * pool_g + page * pool_p + (s * pool_s)[:, None] + d[None]
    keys = _load(ptrs, real[None], scales_ptr + g * scales_g + page * scales_p + s, FP8)
    to = out_ptr + g * out_g + page * out_p + part * 2 * DIM + d
    tl.store(to, tl.min(keys, 0).to(out_ptr.dtype.element_ty), mask=real)
    tl.store(to + DIM, tl.max(keys, 0).to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _labels(
    pool_ptr, physical_ptr, channels_ptr, scales_ptr, out_ptr, pool_g, pool_p, pool_s, scales_g, scales_p,
    channels_g, channels_r, out_g, out_p,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    page, g = tl.load(physical_ptr + tl.program_id(0)).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page < 0:
        return
    s, r = tl.arange(0, PAGE), tl.arange(0, WIDE)
    channel = tl.load(channels_ptr + g * channels_g + r * channels_r, mask=r < TAKEN, other=-1)
    ptrs = pool_ptr + g * pool_g + page * pool_p + (s.to(tl.int64) * pool_s)[:, None] + channel[None]
    label = _load(ptrs, (channel >= 0)[None], scales_ptr + g * scales_g + page * scales_p + s, FP8)
    to = out_ptr + g * out_g + page * out_p + (s * TAKEN)[:, None] + r[None]
    tl.store(to, label.to(out_ptr.dtype.element_ty), mask=(r < TAKEN)[None])


@triton.jit
def _pools(
    pool_ptr, physical_ptr, cos_ptr, sin_ptr, scales_ptr, out_ptr,
    pool_g, pool_p, pool_s, scales_g, scales_p, out_g, out_p,
    PAGE: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    page, g = tl.load(physical_ptr + f).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page < 0:
        return
    s, i = tl.arange(0, PAGE), tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    keys = pool_ptr + g * pool_g + page * pool_p + (s.to(tl.int64) * pool_s)[:, None] + i[None]
    to = out_ptr + g * out_g + page * out_p + i
    pair = i < TURNED
    at = f * PAGE * TURNED + (s * TURNED)[:, None] + i[None]
    cos = tl.load(cos_ptr + at, mask=pair[None], other=0.0)
    sin = tl.load(sin_ptr + at, mask=pair[None], other=0.0)
    scales = scales_ptr + g * scales_g + page * scales_p + s
    low = _load(keys, pair[None], scales, FP8)
    high = _load(keys + TURNED, pair[None], scales, FP8)
    _store_pools(to, low * cos + high * sin, pair, PAGE, DIM)
    _store_pools(to + TURNED, high * cos - low * sin, pair, PAGE, DIM)
    if 2 * TURNED < DIM:
        plain = 2 * TURNED + i < DIM
        rest = _load(keys + 2 * TURNED, plain[None], scales, FP8)
        _store_pools(to + 2 * TURNED, rest, plain, PAGE, DIM)


@triton.jit
def _store_pools(to, keys, real, PAGE: tl.constexpr, DIM: tl.constexpr):
    """keys [S, n]: maximum, minimum and mean to three rows of DIM."""
    tl.store(to, tl.max(keys, 0).to(to.dtype.element_ty), mask=real)
    tl.store(to + DIM, tl.min(keys, 0).to(to.dtype.element_ty), mask=real)
    tl.store(to + 2 * DIM, (tl.sum(keys, 0) / PAGE).to(to.dtype.element_ty), mask=real)
