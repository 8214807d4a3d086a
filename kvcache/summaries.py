"""Page summaries: what selectors know of a full page without reading it. Written when the page fills, never changed,
and shared with the page by every sequence that shares it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gossamer.kernels.fp8 import FP8
from gossamer.kernels.layout import PagedKV
from gossamer.kernels.page_summaries import page_bounds, page_labels, page_means, page_pools
from gossamer.kernels.rotary import Rotary
from gossamer.kvcache.groups import HeadGroup

NO_CHANNEL = -1


@dataclass(frozen=True, slots=True)
class FilledPages:
    """The pages that a step fills, all of them whole once its keys are stored."""

    seq: Tensor  # [F] int32, row of the page table
    page: Tensor  # [F] int32, logical

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]], device: torch.device | str) -> "FilledPages":
        """(seq, page) from the host; one transfer."""
        packed = torch.tensor(pairs, dtype=torch.int32).view(-1, 2).T.contiguous().to(device, non_blocking=True)
        return cls(packed[0], packed[1])

    def physical(self, kv: PagedKV) -> Tensor:
        """[F] int32, where they lie in this view."""
        return kv.table[self.seq.long(), self.page.long()]


class Summary(Protocol):
    """One side table of the pages of a layer. A frozen value; equal ones are written once."""

    @property
    def name(self) -> str:
        """The table's name; equal in all layers, and different for tables of different shape or content."""
        ...

    def shape(self, page_size: int, head_dim: int) -> tuple[int, ...]:
        """Of the table for one head and page."""
        ...

    def write(self, kv: PagedKV, filled: FilledPages) -> None:
        """Fill kv.summaries[name] for these pages."""
        ...


@dataclass(frozen=True, slots=True)
class MeanKeys:
    """The mean key of a page [D]."""

    @property
    def name(self) -> str:
        return "mean keys"

    def shape(self, page_size: int, head_dim: int) -> tuple[int, ...]:
        return (head_dim,)

    def write(self, kv: PagedKV, filled: FilledPages) -> None:
        page_means(kv.k, filled.physical(kv), kv.summaries[self.name], kv.key_scale)


@dataclass(frozen=True, slots=True)
class MeanValues:
    """The mean value of a page [D], for the correction of dropped pages."""

    @property
    def name(self) -> str:
        return "mean values"

    def shape(self, page_size: int, head_dim: int) -> tuple[int, ...]:
        return (head_dim,)

    def write(self, kv: PagedKV, filled: FilledPages) -> None:
        page_means(kv.v, filled.physical(kv), kv.summaries[self.name], kv.value_scale)


@dataclass(frozen=True, slots=True)
class KeyBounds:
    """Minimum and maximum of the keys of each `tokens` neighbours of a page [S // tokens, 2, D] (Quest; LServe)."""

    tokens: int = 16

    @property
    def name(self) -> str:
        return f"bounds of {self.tokens}"

    def shape(self, page_size: int, head_dim: int) -> tuple[int, ...]:
        return (page_size // self.tokens, 2, head_dim)

    def write(self, kv: PagedKV, filled: FilledPages) -> None:
        page_bounds(kv.k, filled.physical(kv), kv.summaries[self.name], kv.key_scale)


@dataclass(frozen=True, slots=True)
class Labels:
    """Some channels of each key of a page [S, r] (DoubleSparse, Yang et al. 2024).

    source: what the channels come from, the same in all layers. channels[KV head of the layer]: as many as there are,
    NO_CHANNEL to fill up. `on_device` is the same as a tensor.
    """

    source: str
    channels: tuple[tuple[int, ...], ...]
    on_device: Tensor = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"labels of {self.source}"

    def shape(self, page_size: int, head_dim: int) -> tuple[int, ...]:
        return (page_size, len(self.channels[0]))

    def of(self, kv: PagedKV) -> Tensor:
        """[G, r] int32, the channels of the view's heads."""
        return self.on_device.index_select(0, kv.heads)

    def write(self, kv: PagedKV, filled: FilledPages) -> None:
        page_labels(kv.k, filled.physical(kv), self.of(kv), kv.summaries[self.name], kv.key_scale)


@dataclass(frozen=True, slots=True)
class GateKeys:
    """A learned gate's keys of a page [K, E]: maximum, minimum and mean of the page's keys before RoPE, projected, and
    rotated at the page's first position (SeerAttention, Gao et al. 2024; SeerAttention-R, 2025). K is 1, or one for
    each query head of the group.

    source: which gate, the same in all layers. weight [KV heads of the layer, K, 3 D, E]; norm [E] or None.
    """

    source: str
    layer: int
    weight: Tensor = field(compare=False, repr=False)
    norm: Tensor | None = field(compare=False, repr=False)
    rotary: Rotary = field(compare=False, repr=False)  # of the model
    turned: Rotary = field(compare=False, repr=False)  # of the gate

    @property
    def name(self) -> str:
        return f"{self.weight.shape[1]} gate keys of {self.source}"

    def shape(self, page_size: int, head_dim: int) -> tuple[int, ...]:
        return (self.weight.shape[1], self.weight.shape[3])

    def write(self, kv: PagedKV, filled: FilledPages) -> None:
        physical, first = filled.physical(kv).long(), filled.page * kv.page_size
        scale = None if kv.key_scale is None else kv.key_scale[:, physical]
        keys = kv.k[:, physical] if scale is None else kv.k.view(torch.uint8)[:, physical].view(FP8)
        pooled = torch.zeros(*keys.shape[:2], 3, keys.shape[3], device=keys.device)
        number = torch.arange(physical.numel(), dtype=torch.int32, device=keys.device)
        number = torch.where(physical >= 0, number, -1)
        page_pools(keys, number, first, self.rotary.inv_freq, self.rotary.scaling, pooled, scale)
        keys = pooled.flatten(2)[:, None] @ self.weight[kv.heads.long()].float()  # [G, K, f, E]
        if self.norm is not None:
            keys = torch.nn.functional.rms_norm(keys, self.norm.shape, self.norm.float(), 1e-6)
        table = kv.summaries[self.name]
        found = self.turned.turn(keys, first.expand(keys.shape[:3])).transpose(1, 2).to(table.dtype)
        there = (physical >= 0)[:, None, None]  # a page that was released stays as it is
        table[:, physical] = torch.where(there, found, table[:, physical])


def shapes_by_group(
    groups: Sequence[HeadGroup], summaries: Sequence[Sequence[Sequence[Summary]]], page_size: int, head_dim: int
) -> list[Mapping[str, tuple[int, ...]]]:
    """Per group, the tables that one of its heads needs; summaries[layer][KV head], or nothing at all."""
    return [
        {
            summary.name: summary.shape(page_size, head_dim)
            for layer, heads in group.slots
            for head in heads
            for summary in (summaries[layer][head] if summaries else ())
        }
        for group in groups
    ]
