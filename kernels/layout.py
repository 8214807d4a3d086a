"""The data every kernel reads: where keys live (PagedKV), which queries (QueryBlocks), which keys (SparseIndex).

Letters: B sequences, T query tokens of a step, H query heads, G key/value heads of one view, N query blocks,
P physical pages, L logical pages of the longest sequence, S tokens per page, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.kernels.fp8 import FP8, SCALE

Array = NDArray[Any]  # on the host

PAGE_SIZE = 64
NULL_PAGE = -1  # a logical page whose memory was released
UNLIMITED = 2**30  # a window no sequence outgrows


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One layer's keys and values, for the heads that share one page table.

    A query at position p of sequence b may see, through head g, the key at position j when
    j <= p and (j > p - window[b, g] or j < sink[b, g]).
    """

    k: Tensor  # [G, P, S, D]; the numbers times `scale` where that is not None
    v: Tensor  # [G, P, S, D]
    table: Tensor  # [B, L] int32, logical page -> physical page or NULL_PAGE
    length: Tensor  # [B] int32, tokens stored so far, this step's included
    heads: Tensor  # [G] int32, which KV heads of the layer these are
    sink: Tensor  # [B, G] int32, tokens at the start that stay visible
    window: Tensor  # [B, G] int32, most recent tokens that are visible (own token included); UNLIMITED for all
    ratio: int  # query heads per KV head: query heads h * ratio ... h * ratio + ratio - 1 read KV head h
    summaries: Mapping[str, Tensor] = field(default_factory=dict)  # [G, P, ...] each: what selectors know of full pages
    scale: Tensor | None = None  # [2, G, P, S] bfloat16: of each key and each value, where they are FP8 (fp8.py)

    def __post_init__(self) -> None:
        assert self.k.shape == self.v.shape and self.k.shape[0] == self.heads.numel()
        assert self.sink.shape == self.window.shape == (self.table.shape[0], self.heads.numel())
        assert self.k.stride(-1) == self.v.stride(-1) == 1
        if self.scale is not None:
            assert self.k.dtype == self.v.dtype == FP8 and self.scale.dtype == SCALE
            assert self.scale.shape == (2, *self.k.shape[:3]) and self.scale.stride(-1) == 1
        assert all(x.dtype == torch.int32 for x in (self.table, self.length, self.heads, self.sink, self.window))

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def key_scale(self) -> Tensor | None:
        """[G, P, S]"""
        return None if self.scale is None else self.scale[0]

    @property
    def value_scale(self) -> Tensor | None:
        """[G, P, S]"""
        return None if self.scale is None else self.scale[1]

    def only(self, own: slice) -> "PagedKV":
        """The same memory, seen by a run of the heads."""
        return PagedKV(
            self.k[own],
            self.v[own],
            self.table,
            self.length,
            self.heads[own],
            self.sink[:, own],
            self.window[:, own],
            self.ratio,
            {name: table[own] for name, table in self.summaries.items()},
            None if self.scale is None else self.scale[:, own],
        )


class BlockRow(NamedTuple):
    """One tile of consecutive queries of one sequence."""

    seq: int  # row of the page table
    token: int  # index of the tile's first query in q
    pos: int  # position of that query in its sequence
    count: int  # type: ignore[assignment]  # queries in the tile; hides tuple.count


@dataclass(frozen=True, slots=True)
class QueryBlocks:
    """A step's queries of one kind, cut into tiles at multiples of `size` counted from the sequence's first token.

    A chunk may start or end inside a tile, so a tile can hold fewer than `size` queries. `rows` is the host's copy
    of the four tensors, so that nothing has to be read back from a device.
    """

    size: int  # 1 for generated tokens
    rows: tuple[BlockRow, ...]
    seq: Tensor  # [N] int32
    token: Tensor  # [N] int32
    pos: Tensor  # [N] int32
    count: Tensor  # [N] int32

    @classmethod
    def of(cls, size: int, rows: Sequence[BlockRow], device: torch.device | str = "cpu") -> "QueryBlocks":
        """Tiles from host values; one transfer to the device. Each tensor begins at a multiple of 16 bytes: a kernel
        is compiled anew for other addresses."""
        packed = torch.zeros(4, -(-len(rows) // 4) * 4, dtype=torch.int32)
        if rows:
            packed[:, : len(rows)] = torch.tensor(rows, dtype=torch.int32).T
        seq, token, pos, count = packed.to(device, non_blocking=True)[:, : len(rows)].unbind()
        return cls(size, tuple(rows), seq, token, pos, count)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def single(self) -> bool:
        """Whether each tile has one query."""
        return self.size == 1 or all(row.count == 1 for row in self.rows)

    def take(self, own: Sequence[int]) -> "QueryBlocks":
        """Some of the tiles."""
        return QueryBlocks.of(self.size, [self.rows[n] for n in own], self.seq.device)

    @property
    def origin(self) -> Tensor:
        """[N], where each tile starts in its sequence, whatever the chunk: what selectors may depend on."""
        return self.pos // self.size * self.size


@dataclass(frozen=True, slots=True)
class SparseIndex:
    """Which keys query block n of head g reads: logical pages[start[g, n] : start[g, n] + count[g, n]], and the single
    tokens tokens[token_start[g, n] : token_start[g, n] + token_count[g, n]] (positions) when `tokens` is not None.

    A run is ascending and without repeats; pages hold at least the pages of the block's own queries, and no page that
    was released or lies in the future; no token lies inside a selected page of the same run. Causality and the head's
    window still have to be applied key by key.
    """

    start: Tensor  # [G, N] int32
    count: Tensor  # [G, N] int32
    pages: Tensor  # [capacity] int32
    token_start: Tensor | None = None  # [G, N] int32
    token_count: Tensor | None = None  # [G, N] int32
    tokens: Tensor | None = None  # [capacity] int32

    def only(self, heads: slice, blocks: Sequence[int] | None) -> "SparseIndex":
        """The same runs, for some of the heads and blocks (None: all of these)."""

        chosen = None
        if blocks is not None:
            chosen = torch.tensor(blocks, dtype=torch.long).to(self.start.device, non_blocking=True)

        def cut(table: Tensor | None) -> Tensor | None:
            if table is None:
                return None
            return table[heads] if chosen is None else table[heads, chosen]

        start, count = cut(self.start), cut(self.count)
        assert start is not None and count is not None
        return SparseIndex(start, count, self.pages, cut(self.token_start), cut(self.token_count), self.tokens)
