"""One program per (page, head), or per part of one: a page's keys are read once, its summary is written."""

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.page_summaries import turn_back

TURNED_PAGES = 1024  # pages whose cosines and sines are in memory at once: 32 MiB for 128 turned dimensions
PAIRS = 32  # pairs of turned dimensions that one program undoes


def launch_means(pool: Tensor, physical: Tensor, out: Tensor) -> None:
    """As gossamer.kernels.page_summaries.page_means."""
    _means[(physical.numel(), pool.shape[0])](
        pool, physical, out, *pool.stride()[:3], *out.stride()[:2],
        PAGE=pool.shape[2], DIM=pool.shape[3], WIDE=triton.next_power_of_2(pool.shape[3]),
        enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
    )  # fmt: skip


def launch_bounds(pool: Tensor, physical: Tensor, out: Tensor) -> None:
    """As gossamer.kernels.page_summaries.page_bounds."""
    parts = out.shape[2]
    _bounds[(physical.numel(), pool.shape[0], parts)](
        pool, physical, out, *pool.stride()[:3], *out.stride()[:2],
        PART=pool.shape[2] // parts, DIM=pool.shape[3], WIDE=triton.next_power_of_2(pool.shape[3]),
        enable_fp_fusion=True,
    )  # fmt: skip


def launch_labels(pool: Tensor, physical: Tensor, channels: Tensor, out: Tensor) -> None:
    """As gossamer.kernels.page_summaries.page_labels."""
    taken = channels.shape[1]
    _labels[(physical.numel(), pool.shape[0])](
        pool, physical, channels, out, *pool.stride()[:3], *channels.stride(), *out.stride()[:2],
        PAGE=pool.shape[2], TAKEN=taken, WIDE=triton.next_power_of_2(taken),
        enable_fp_fusion=True,
    )  # fmt: skip


def launch_pools(pool: Tensor, physical: Tensor, first: Tensor, inv_freq: Tensor, scaling: float, out: Tensor) -> None:
    """As gossamer.kernels.page_summaries.page_pools."""
    dim, turned = pool.shape[3], inv_freq.numel()
    programs = triton.cdiv(max(turned, dim - 2 * turned), PAIRS)
    for pages, begins in zip(physical.split(TURNED_PAGES), first.split(TURNED_PAGES), strict=True):
        cos, sin = turn_back(begins, inv_freq, scaling, pool.shape[2])
        _pools[(pages.numel(), pool.shape[0], programs)](
            pool, pages, cos, sin, out, *pool.stride()[:3], *out.stride()[:2],
            PAGE=pool.shape[2], DIM=dim, TURNED=turned, PAIRS=PAIRS,
            enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _means(
    pool_ptr, physical_ptr, out_ptr, pool_g, pool_p, pool_s, out_g, out_p,
    PAGE: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    page, g = tl.load(physical_ptr + tl.program_id(0)).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page < 0:
        return
    s, d = tl.arange(0, PAGE).to(tl.int64), tl.arange(0, WIDE)
    real = d < DIM
    ptrs = pool_ptr + g * pool_g + page * pool_p + (s * pool_s)[:, None] + d[None]
    mean = tl.sum(tl.load(ptrs, mask=real[None], other=0.0).to(tl.float32), 0) / PAGE
    tl.store(out_ptr + g * out_g + page * out_p + d, mean.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _bounds(
    pool_ptr, physical_ptr, out_ptr, pool_g, pool_p, pool_s, out_g, out_p,
    PART: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    page, g = tl.load(physical_ptr + tl.program_id(0)).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page < 0:
        return
    part = tl.program_id(2)
    s, d = (part * PART + tl.arange(0, PART)).to(tl.int64), tl.arange(0, WIDE)
    real = d < DIM
    ptrs = pool_ptr + g * pool_g + page * pool_p + (s * pool_s)[:, None] + d[None]
    keys = tl.load(ptrs, mask=real[None], other=0.0).to(tl.float32)
    to = out_ptr + g * out_g + page * out_p + part * 2 * DIM + d
    tl.store(to, tl.min(keys, 0).to(out_ptr.dtype.element_ty), mask=real)
    tl.store(to + DIM, tl.max(keys, 0).to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _labels(
    pool_ptr, physical_ptr, channels_ptr, out_ptr, pool_g, pool_p, pool_s, channels_g, channels_r, out_g, out_p,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    page, g = tl.load(physical_ptr + tl.program_id(0)).to(tl.int64), tl.program_id(1).to(tl.int64)
    if page < 0:
        return
    s, r = tl.arange(0, PAGE), tl.arange(0, WIDE)
    channel = tl.load(channels_ptr + g * channels_g + r * channels_r, mask=r < TAKEN, other=-1)
    ptrs = pool_ptr + g * pool_g + page * pool_p + (s.to(tl.int64) * pool_s)[:, None] + channel[None]
    label = tl.load(ptrs, mask=(channel >= 0)[None], other=0.0)
    to = out_ptr + g * out_g + page * out_p + (s * TAKEN)[:, None] + r[None]
    tl.store(to, label.to(out_ptr.dtype.element_ty), mask=(r < TAKEN)[None])


@triton.jit
def _pools(
    pool_ptr, physical_ptr, cos_ptr, sin_ptr, out_ptr, pool_g, pool_p, pool_s, out_g, out_p,
    PAGE: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr,
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
    low = tl.load(keys, mask=pair[None], other=0.0).to(tl.float32)
    high = tl.load(keys + TURNED, mask=pair[None], other=0.0).to(tl.float32)
    _store_pools(to, low * cos + high * sin, pair, PAGE, DIM)
    _store_pools(to + TURNED, high * cos - low * sin, pair, PAGE, DIM)
    if 2 * TURNED < DIM:
        plain = 2 * TURNED + i < DIM
        rest = tl.load(keys + 2 * TURNED, mask=plain[None], other=0.0).to(tl.float32)
        _store_pools(to + 2 * TURNED, rest, plain, PAGE, DIM)


@triton.jit
def _store_pools(to, keys, real, PAGE: tl.constexpr, DIM: tl.constexpr):
    """keys [S, n]: maximum, minimum and mean to three rows of DIM."""
    tl.store(to, tl.max(keys, 0).to(to.dtype.element_ty), mask=real)
    tl.store(to + DIM, tl.min(keys, 0).to(to.dtype.element_ty), mask=real)
    tl.store(to + 2 * DIM, (tl.sum(keys, 0) / PAGE).to(to.dtype.element_ty), mask=real)
