"""A rotary embedding, as models and gates have them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary embedding: dimension i and i + R of a head turn by position * inv_freq[i] [R] float32 and grow by
    `scaling`; what lies behind stays."""

    inv_freq: Tensor
    scaling: float = 1.0

    def turn(self, x: Tensor, position: Tensor, *, back: bool = False) -> Tensor:
        """x [..., D] at `position` [...] -> the same rotated, or rotated back, in float32."""
        angle = position[..., None].float() * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        size = self.inv_freq.numel()
        low, high, rest = x.float().split((size, size, x.shape[-1] - 2 * size), -1)
        if back:
            cos, sin = cos / self.scaling, -sin / self.scaling
        else:
            cos, sin = cos * self.scaling, sin * self.scaling
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), -1)
