"""Keys and values as float8_e4m3fn with a scale per KV head and token: half the memory of bfloat16.

A number keeps three bits behind its first one, whatever the scale, so that the scale's work is to keep a vector's
numbers within the type's range of 2^-9 to 448. One that belongs to the token is known when the token arrives and never
changes, where a page's would grow while the page fills.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
SCALE = torch.bfloat16
LARGEST = 448.0  # that FP8 knows
LEAST = 2.0**-100  # scale, of vectors without a number


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> the same divided by its scale and rounded, FP8, and the scale [...], bfloat16: the largest
    magnitude over 448, which may round down, for 448 is what numbers up to 464 become. NaN where x holds a number that
    is not finite."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    scale = torch.where(largest.isfinite(), (largest / LARGEST).clamp_min(LEAST), torch.nan).to(SCALE)
    return (wide / scale[..., None].float()).to(FP8), scale


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """stored [..., D] FP8, or its bytes; scale [...] -> [..., D] in `dtype`, a copy."""
    return stored.view(FP8).to(dtype).mul_(scale[..., None])
