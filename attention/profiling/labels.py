"""Which channels of a key tell most about its products: the labels of DoubleSparse (Yang et al. 2024)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gossamer.attention.profiling.capture import Captured
from gossamer.attention.profiling.reading import LayerCall


class ChannelProducts:
    """Looks on while texts are read, and adds up |q_c * k_c| over all positions of all texts, of a query and the key at
    its own position, over the query heads of each group.

    rotary: how many rotary pairs a head has; channels c and c + rotary make one.
    """

    def __init__(self, rotary: int = 0) -> None:
        self._rotary = rotary
        self._sums: dict[int, Tensor] = {}

    def layer(self, call: LayerCall) -> None:
        self.add(call.layer, call.q, call.k)

    def add(self, layer: int, q: Tensor, k: Tensor) -> None:
        """q [T, H, D], k [T, G, D]"""
        grouped = q.unflatten(1, (k.shape[1], -1)).abs().sum(2, dtype=torch.float32)  # |q| |k| = |q k|
        products = (grouped * k.abs()).sum(0, dtype=torch.float64).cpu()
        self._sums[layer] = self._sums[layer] + products if layer in self._sums else products

    def ranked(self) -> list[Tensor]:
        """For each layer the channels of each KV head, the most important first [G, D] int32. The two of a rotary pair
        stand together, because a rotation moves what one of them holds into the other."""
        return [self._rank(sums) for _, sums in sorted(self._sums.items())]

    def _rank(self, sums: Tensor) -> Tensor:
        pairs, dim = self._rotary, sums.shape[1]
        weight = sums.clone()
        weight[:, :pairs] = weight[:, pairs : 2 * pairs] = (sums[:, :pairs] + sums[:, pairs : 2 * pairs]) / 2
        unit = torch.arange(dim)
        unit[pairs : 2 * pairs] -= pairs  # a pair is known by its first channel
        order = weight.argsort(dim=-1, descending=True, stable=True)
        # stable, by the place of the better known of the two: equal weights leave first channels first
        first = torch.full((len(sums), dim), dim).scatter_reduce(
            1, unit[order], torch.arange(dim).expand(len(sums), -1), "amin"
        )
        return (first[:, unit] * 2 + (torch.arange(dim) >= pairs).long()).argsort(dim=-1, stable=True).int()


def rank_channels(texts: Iterable[Sequence[Captured]], rotary: int = 0) -> list[Tensor]:
    """texts: for each its layers -> the same of what was captured."""
    products = ChannelProducts(rotary)
    for layers in texts:
        for number, layer in enumerate(layers):
            products.add(number, layer.q, layer.k)
    return products.ranked()


def write_labels(path: Path, ranked: Sequence[Tensor]) -> None:
    """The file that a policy's double-sparsity backend names (attention/artefacts.py)."""
    save_file({f"layers.{layer}": channels.cpu().contiguous() for layer, channels in enumerate(ranked)}, path)
