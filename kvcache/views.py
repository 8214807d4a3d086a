"""What the layers of one step read and write: pools and page tables as PagedKV."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels.layout import NULL_PAGE, UNLIMITED, PagedKV
from gossamer.kvcache.groups import HeadGroup
from gossamer.kvcache.pool import PageArray, PagePool
from gossamer.kvcache.summaries import Summary
from gossamer.kvcache.table import PageTable

GPU_WIDTHS = 16  # pages; tables there are as wide as a multiple of it, because kernels are compiled anew for others


class _LayerSlice(NamedTuple):
    """The part of a group that lies in one layer."""

    group: int
    k: Tensor  # [G, P, S, D]
    v: Tensor
    heads: Tensor  # [G] int32
    numbers: tuple[int, ...]  # the same heads, on the host
    limits: tuple[int, int]  # (group, G), which sink and window tensors fit
    summaries: Mapping[str, Tensor]
    written: tuple[Summary, ...]  # what writes them
    scale: Tensor | None  # [2, G, P, S]


class Packed(NamedTuple):
    """The tables of a step side by side."""

    memory: Tensor  # int32
    rows: int  # sequences
    width: int  # logical pages of the longest


class StepViews:
    """The views of one step. Tables, lengths, sinks and windows are shared by all layers."""

    __slots__ = ("_layers", "_length", "_limits", "_made", "_ratio", "_tables", "_unlimited")

    def __init__(
        self,
        layers: Sequence[Sequence[_LayerSlice]],
        tables: Sequence[Tensor],
        length: Tensor,
        limits: dict[tuple[int, int], tuple[Tensor, Tensor]],
        ratio: int,
        unlimited: np.ndarray[tuple[int, int], np.dtype[np.bool_]],
    ) -> None:
        self._layers = layers
        self._tables = tables
        self._unlimited = unlimited
        self._length = length
        self._limits = limits
        self._ratio = ratio
        self._made: dict[int, tuple[PagedKV, ...]] = {}

    def layer(self, layer: int) -> tuple[PagedKV, ...]:
        """One view per group that has heads in this layer; together they cover each KV head of the layer once."""
        made = self._made.get(layer)
        if made is None:
            made = self._made[layer] = tuple(self._view(part) for part in self._layers[layer])
        return made

    def heads(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """The KV heads of each of the layer's views, on the host."""
        return tuple(part.numbers for part in self._layers[layer])

    def summaries(self, layer: int) -> tuple[tuple[Summary, ...], ...]:
        """What each of the layer's views has to know of full pages."""
        return tuple(part.written for part in self._layers[layer])

    def unlimited(self, layer: int, view: int) -> tuple[bool, ...]:
        """For each sequence, whether the heads of one of the layer's views see all of it."""
        return tuple(self._unlimited[self._layers[layer][view].group].tolist())

    def whole(self, layer: int, head: int, table: PageTable) -> bool:
        """Whether a sequence of the step still has all pages of one KV head."""
        group = next(part.group for part in self._layers[layer] if head in part.numbers)
        return not np.any(table.rows[group] == NULL_PAGE)

    def _view(self, part: _LayerSlice) -> PagedKV:
        sink, window = self._limits[part.limits]
        table = self._tables[part.group]
        limits = (part.heads, sink, window, self._ratio)
        return PagedKV(part.k, part.v, table, self._length, *limits, part.summaries, part.scale)


class Room:
    """Memory on the device for the tables of one step after another, none with more than `rows` sequences or `width`
    logical pages, and its views, which always show the last step put there. Rows that are left over are free: they
    hold no page."""

    __slots__ = ("memory", "rows", "views", "width")

    def __init__(self, rows: int, width: int, memory: Tensor, views: StepViews) -> None:
        self.rows = rows
        self.width = width
        self.memory = memory  # [bytes / 4] int32
        self.views = views


class ViewPlan:
    """What is the same in every step: the pools' slices by layer. Makes the views of a step in one pass over the tables
    and one transfer to the device."""

    def __init__(
        self,
        groups: Sequence[HeadGroup],
        pools: Sequence[PagePool],
        ratio: int,
        summaries: Sequence[Sequence[Sequence[Summary]]],
    ) -> None:
        self._ratio = ratio
        self._device = pools[0].k.device
        self._num_groups = len(groups)
        num_layers = 1 + max(layer for group in groups for layer, _ in group.slots)
        layers: list[list[_LayerSlice]] = [[] for _ in range(num_layers)]
        for number, (group, pool) in enumerate(zip(groups, pools, strict=True)):
            first = 0
            for layer, heads in group.slots:
                own = slice(first, first + len(heads))
                first += len(heads)
                on_device = torch.tensor(heads, dtype=torch.int32, device=self._device)
                limits = (number, len(heads))
                asked = (each for head in heads for each in (summaries[layer][head] if summaries else ()))
                wanted = tuple(dict.fromkeys(asked))
                tables = {each.name: pool.summaries[each.name][own] for each in wanted}
                scale = None if pool.scale is None else pool.scale[:, own]
                layers[layer].append(
                    _LayerSlice(number, pool.k[own], pool.v[own], on_device, heads, limits, tables, wanted, scale)
                )
        for layer, parts in enumerate(layers):
            covered = sorted(head for part in parts for head in part.numbers)
            assert covered == list(range(len(covered))), (
                f"the groups do not cover layer {layer}'s KV heads exactly once"
            )
        self._layers = layers
        self._limits = sorted({part.limits for parts in layers for part in parts})

    def views(self, tables: Sequence[PageTable]) -> StepViews:
        """One row per table, at least one, in the given order."""
        width = max((table.num_pages for table in tables), default=0)
        if self._device.type != "cpu":
            width = -(-width // GPU_WIDTHS) * GPU_WIDTHS
        packed = self._packed(tables, len(tables), width)
        if self._device.type != "cpu":
            packed = Packed(packed.memory.to(self._device, non_blocking=True), packed.rows, packed.width)
        windows = np.stack([table.visible[1] for table in tables], axis=-1)  # [groups, B]
        return self._show(packed, windows >= UNLIMITED)

    def room(self, rows: int, width: int) -> Room:
        """For steps to come of at most so many sequences and logical pages."""
        packed = self._packed((), rows, width)
        memory = packed.memory.to(self._device)
        shown = self._show(Packed(memory, rows, width), np.zeros((self._num_groups, rows), dtype=np.bool_))
        return Room(rows, width, memory, shown)

    def fill(self, room: Room, tables: Sequence[PageTable]) -> None:
        """Let the room show these tables, in the given order."""
        room.memory.copy_(self._packed(tables, room.rows, room.width).memory, non_blocking=True)

    def _packed(self, tables: Sequence[PageTable], rows: int, width: int) -> Packed:
        """All of a step's tables in one buffer on the host, so that there is one transfer."""
        packed = Packed(
            torch.empty(self._starts(rows, width)[-1], dtype=torch.int32, pin_memory=self._device.type == "cuda"),
            rows,
            width,
        )
        self._fill([part.numpy() for part in self._parts(packed)], tables)
        return packed

    def _columns(self, width: int) -> list[int]:
        return [1, *[width] * self._num_groups, *[heads for _, heads in self._limits for _ in range(2)]]

    def _starts(self, rows: int, width: int) -> list[int]:
        """Where the parts begin: at multiples of 16 bytes, as kernels like their pointers."""
        return list(accumulate((-(-rows * columns // 4) * 4 for columns in self._columns(width)), initial=0))

    def _parts(self, packed: Packed) -> list[Tensor]:
        """Lengths [B, 1], page tables [B, L] per group, then sinks and windows [B, G] for each of `_limits`."""
        rows = packed.rows
        return [
            packed.memory[start : start + rows * columns].view(rows, columns)
            for start, columns in zip(self._starts(rows, packed.width), self._columns(packed.width), strict=False)
        ]

    def _show(self, packed: Packed, unlimited: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> StepViews:
        parts = self._parts(packed)
        after = parts[1 + self._num_groups :]
        limits = dict(zip(self._limits, zip(after[::2], after[1::2], strict=True), strict=True))
        page_tables = parts[1 : 1 + self._num_groups]
        return StepViews(self._layers, page_tables, parts[0].view(packed.rows), limits, self._ratio, unlimited)

    def _fill(self, parts: Sequence[PageArray], tables: Sequence[PageTable]) -> None:
        """Write lengths, page tables, sinks and windows into `_parts`."""
        by_group, limits = parts[1 : 1 + self._num_groups], parts[1 + self._num_groups :]
        for row, table in enumerate(tables):
            parts[0][row] = table.length
            for out, pages in zip(by_group, table.rows, strict=True):
                out[row, : table.num_pages] = pages
                out[row, table.num_pages :] = NULL_PAGE
        for part in parts:
            part[len(tables) :] = 0
        for pages in by_group:
            pages[len(tables) :] = NULL_PAGE
        if not tables:
            return
        sinks, windows = np.stack([table.visible for table in tables], axis=-1)[..., None]  # [groups, B, 1] each
        for (group, _), sink, window in zip(self._limits, limits[::2], limits[1::2], strict=True):
            sink[: len(tables)] = sinks[group]
            window[: len(tables)] = windows[group]
