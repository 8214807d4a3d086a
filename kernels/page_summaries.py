"""What the side tables hold of a full page, so that a selector can judge it without reading its keys.

Each function fills out[:, physical] of one table [G, P, ...] and leaves the rest alone. `physical` [F] int32 lists
pages that have just become full; entries NULL_PAGE are skipped. pool [G, P, S, D] has unit stride in D, and within a
page `out` is contiguous. scale [G, P, S] belongs to a pool of FP8 (fp8.py). Letters as in layout.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.kernels.fp8 import dequantise

PIECE_BYTES = 16 << 20  # most that the torch forms gather at once


def page_means(pool: Tensor, physical: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """out [G, P, D]: the mean of the page's keys (or values), in float32, rounded to out's type."""
    _check(pool, out, (pool.shape[3],))
    if physical.numel() == 0:
        return
    if pool.is_cuda:
        from gossamer.kernels.triton.page_summaries import launch_means

        return launch_means(pool, physical, out, scale)
    page_means_torch(pool, physical, out, scale)


def page_means_torch(pool: Tensor, physical: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """What page_means means; also how the CPU runs it."""
    for pages, _ in _pieces(pool, physical):
        out[:, pages] = _keys(pool, pages, scale).mean(2, dtype=torch.float32).to(out.dtype)


def page_bounds(pool: Tensor, physical: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """out [G, P, c, 2, D]: minimum and maximum, dimension by dimension, of every S / c consecutive keys."""
    _check(pool, out, (out.shape[2], 2, pool.shape[3]))
    assert pool.shape[2] % out.shape[2] == 0
    if physical.numel() == 0:
        return
    if pool.is_cuda:
        from gossamer.kernels.triton.page_summaries import launch_bounds

        return launch_bounds(pool, physical, out, scale)
    page_bounds_torch(pool, physical, out, scale)


def page_bounds_torch(pool: Tensor, physical: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """What page_bounds means; also how the CPU runs it."""
    for pages, _ in _pieces(pool, physical):
        keys = _keys(pool, pages, scale).unflatten(2, (out.shape[2], -1))  # [G, f, c, S / c, D]
        out[:, pages, :, 0] = keys.amin(3).to(out.dtype)
        out[:, pages, :, 1] = keys.amax(3).to(out.dtype)


def page_labels(pool: Tensor, physical: Tensor, channels: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """out [G, P, S, r]: each key's values in its head's channels [G, r] int32; 0 where a channel is -1."""
    _check(pool, out, (pool.shape[2], channels.shape[1]))
    assert channels.shape[0] == pool.shape[0] and channels.dtype == torch.int32
    if physical.numel() == 0:
        return
    if pool.is_cuda:
        from gossamer.kernels.triton.page_summaries import launch_labels

        return launch_labels(pool, physical, channels, out, scale)
    page_labels_torch(pool, physical, channels, out, scale)


def page_labels_torch(
    pool: Tensor, physical: Tensor, channels: Tensor, out: Tensor, scale: Tensor | None = None
) -> None:
    """What page_labels means; also how the CPU runs it."""
    head = torch.arange(pool.shape[0])[:, None, None, None]
    slot = torch.arange(pool.shape[2])[:, None]
    channel = channels.long()[:, None, None]  # [G, 1, 1, r]
    for pages, _ in _pieces(pool, physical):
        if scale is None:
            taken = pool[head, pages[:, None, None], slot, channel.clamp(min=0)]  # [G, f, S, r]
        else:
            stored = pool.view(torch.uint8)[head, pages[:, None, None], slot, channel.clamp(min=0)]
            taken = dequantise(stored, scale[:, pages], torch.float32)
        out[:, pages] = taken.masked_fill_(channel < 0, 0).to(out.dtype)


def page_pools(
    pool: Tensor,
    physical: Tensor,
    first: Tensor,
    inv_freq: Tensor,
    scaling: float,
    out: Tensor,
    scale: Tensor | None = None,
) -> None:
    """out [G, P, 3, D]: maximum, minimum and mean over the page of its keys as they were before RoPE.

    first [F] int32: position of each page's first token. inv_freq [R] float32: RoPE turned dimensions i and i + R of a
    key by the angle position * inv_freq[i] (rotate-half), i < R, and multiplied both by `scaling`; dimensions from 2R
    on it left alone.
    """
    _check(pool, out, (3, pool.shape[3]))
    assert first.shape == physical.shape and first.dtype == torch.int32
    assert inv_freq.dtype == torch.float32 and 2 * inv_freq.numel() <= pool.shape[3]
    if physical.numel() == 0:
        return
    if pool.is_cuda:
        from gossamer.kernels.triton.page_summaries import launch_pools

        return launch_pools(pool, physical, first, inv_freq, scaling, out, scale)
    page_pools_torch(pool, physical, first, inv_freq, scaling, out, scale)


def page_pools_torch(
    pool: Tensor,
    physical: Tensor,
    first: Tensor,
    inv_freq: Tensor,
    scaling: float,
    out: Tensor,
    scale: Tensor | None = None,
) -> None:
    """What page_pools means; also how the CPU runs it."""
    turned = inv_freq.numel()
    for pages, begins in _pieces(pool, physical, first):
        cos, sin = turn_back(begins, inv_freq, scaling, pool.shape[2])
        keys = _keys(pool, pages, scale).float()  # [G, f, S, D]
        low, high, plain = keys[..., :turned], keys[..., turned : 2 * turned], keys[..., 2 * turned :]
        keys = torch.cat((low * cos + high * sin, high * cos - low * sin, plain), -1)
        out[:, pages] = torch.stack((keys.amax(2), keys.amin(2), keys.mean(2)), 2).to(out.dtype)


def turn_back(first: Tensor, inv_freq: Tensor, scaling: float, page_size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [F, S, R] float32, over `scaling`, of the angles that RoPE turned the pages' keys by.

    The angle is one product in float32, as models compute it: at long range a better one would not undo theirs.
    """
    position = first[:, None] + torch.arange(page_size, device=first.device)
    angle = position.float()[..., None] * inv_freq
    return angle.cos() / scaling, angle.sin() / scaling


def _keys(pool: Tensor, pages: Tensor, scale: Tensor | None) -> Tensor:
    """[G, f, S, D], as stored or else float32."""
    if scale is None:
        return pool[:, pages]
    return dequantise(pool.view(torch.uint8)[:, pages], scale[:, pages], torch.float32)


def _check(pool: Tensor, out: Tensor, summary: tuple[int, ...]) -> None:
    assert pool.stride(-1) == 1
    assert out.shape == (*pool.shape[:2], *summary) and out[:1, :1].is_contiguous()


def _pieces(pool: Tensor, physical: Tensor, first: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The pages that are some, and what `first` says of them, a bounded number at a time."""
    real = physical >= 0
    pages = physical[real].long()
    begins = pages if first is None else first[real]
    step = max(1, PIECE_BYTES // (4 * pool.shape[0] * pool.shape[2] * pool.shape[3]))
    yield from zip(pages.split(step), begins.split(step), strict=True)
