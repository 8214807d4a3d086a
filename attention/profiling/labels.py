"""Which channels of a key tell most about its products: the labels of DoubleSparse (Yang et al. 2024)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gossamer.attention.profiling.capture import Captured


def rank_channels(texts: Iterable[Sequence[Captured]]) -> list[Tensor]:
    """texts: for each its layers -> for each layer the channels of each KV head, the most important first [G, D].

    A channel counts by the mean of |q_c * k_c| over all positions of all texts, of a query and the key at its own
    position, added up over the query heads of the group.
    """
    sums: list[Tensor] = []
    for layers in texts:
        found = [_products(layer) for layer in layers]
        sums = [old + new for old, new in zip(sums, found, strict=True)] if sums else found
    return [each.argsort(dim=-1, descending=True, stable=True).int() for each in sums]


def _products(layer: Captured) -> Tensor:
    """[G, D] float64"""
    q = layer.q.unflatten(1, (layer.k.shape[1], layer.ratio)).abs().sum(2, dtype=torch.float32)  # |q| |k| = |q k|
    products: Tensor = q * layer.k.abs()
    return products.sum(0, dtype=torch.float64)


def write_labels(path: Path, ranked: Sequence[Tensor]) -> None:
    """The file that a policy's double-sparsity backend names (attention/artefacts.py)."""
    save_file({f"layers.{layer}": channels.cpu() for layer, channels in enumerate(ranked)}, path)
