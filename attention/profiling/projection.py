"""What an error of one head's output weighs behind the output projection, where heads can be compared."""

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attention.profiling.reading import Shape


def output_weight(module: nn.Module, shape: Shape) -> Tensor:
    """The matrix [hidden, H * D] float32 by which an attention module turns its heads' outputs into its own. Applied to
    unit vectors, so that a quantised projection works too. Raises ValueError where there is no such projection."""
    wide = shape.query_heads * shape.head_dim
    projection: Any = getattr(module, "o_proj", None)
    if projection is None:
        found = [each for name, each in module.named_children() if name in ("dense", "out_proj", "wo", "c_proj")]
        if len(found) != 1:
            raise ValueError(f"{type(module).__name__} has no output projection under a name that is known")
        projection = found[0]
    if isinstance(projection, nn.Linear) and projection.weight.is_floating_point():
        return projection.weight.detach().float()
    with torch.no_grad():
        unit = torch.eye(wide, dtype=shape.dtype, device=shape.device)
        answer: Tensor = (projection(unit) - projection(torch.zeros_like(unit[:1]))).float().T
    return answer


def gram_of_heads(weight: Tensor, shape: Shape) -> Tensor:
    """weight [hidden, H * D] -> [G, R, R] with R = ratio * D: e' gram e is the squared norm, behind the projection, of
    an error e in the outputs of a KV head's query heads."""
    own = weight.unflatten(1, (shape.kv_heads, shape.ratio * shape.head_dim)).transpose(0, 1)  # [G, hidden, R]
    gram: Tensor = own.transpose(1, 2) @ own
    return gram


def squared_errors(error: Tensor, gram: Tensor) -> Tensor:
    """error [T, H, D], gram [G, R, R] -> [T, G] float32"""
    own = error.float().flatten(1).unflatten(1, (gram.shape[0], -1)).transpose(0, 1)  # [G, T, R]
    squares: Tensor = ((own @ gram) * own).sum(-1).T
    return squares.clamp(min=0)
