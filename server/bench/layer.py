"""One layer's attention over noise, which no selector finds easy, for benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gossamer.attention.index import build_index
from gossamer.attention.selectors.base import Proposal
from gossamer.attention.selectors.budget import Budget
from gossamer.attention.step import TILE_ROWS
from gossamer.kernels.layout import NULL_PAGE, PAGE_SIZE, UNLIMITED, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kvcache.summaries import Labels


@dataclass(frozen=True)
class Shape:
    """A layer's heads, and where they live."""

    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str

    @property
    def ratio(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def noise(self, tokens: int, heads: int) -> Tensor:
        """[tokens, heads, D]"""
        return torch.randn(tokens, heads, self.head_dim, dtype=self.dtype, device=self.device)

    def labels(self) -> Labels:
        """Sixteen channels of each head, or a quarter where that is less."""
        few = max(1, min(16, self.head_dim // 4))
        channels = torch.stack([torch.randperm(self.head_dim)[:few] for _ in range(self.kv_heads)]).int()
        return Labels("noise", tuple(map(tuple, channels.tolist())), channels.to(self.device))


def paged(shape: Shape, lengths: Sequence[int]) -> PagedKV:
    """Sequences of noise, their pages in random places."""
    device, counts = shape.device, [-(-length // PAGE_SIZE) for length in lengths]
    order = torch.randperm(sum(counts), dtype=torch.int32)
    table = torch.full((len(lengths), max(counts)), NULL_PAGE, dtype=torch.int32)
    for row, pages in zip(table, order.split(counts), strict=True):
        row[: len(pages)] = pages
    pool = (shape.kv_heads, sum(counts), PAGE_SIZE, shape.head_dim)
    sink = torch.zeros(len(lengths), shape.kv_heads, dtype=torch.int32, device=device)
    return PagedKV(
        torch.randn(pool, dtype=shape.dtype, device=device),
        torch.randn(pool, dtype=shape.dtype, device=device),
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.arange(shape.kv_heads, dtype=torch.int32, device=device),
        sink,
        torch.full_like(sink, UNLIMITED),
        shape.ratio,
    )


class Layer:
    """Keys and values of `batch` sequences of `length` tokens, in pages, and side by side when asked for."""

    def __init__(self, shape: Shape, batch: int, length: int) -> None:
        self.shape, self.batch, self.length = shape, batch, length
        self.kv = paged(shape, [length] * batch)

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """[B, G, length, D] each."""
        table = self.kv.table.long()
        k, v = (pool[:, table].flatten(2, 3).transpose(0, 1) for pool in (self.kv.k, self.kv.v))
        return k.contiguous()[:, :, : self.length], v.contiguous()[:, :, : self.length]

    def prompts(self) -> QueryBlocks:
        """Every token of the sequences, in tiles."""
        size = max(1, TILE_ROWS // self.shape.ratio)
        rows = [
            BlockRow(seq, seq * self.length + first, first, min(size, self.length - first))
            for seq in range(self.batch)
            for first in range(0, self.length, size)
        ]
        return QueryBlocks.of(size, rows, self.shape.device)

    def newest(self) -> QueryBlocks:
        """The last token of each sequence."""
        rows = [BlockRow(seq, seq, self.length - 1, 1) for seq in range(self.batch)]
        return QueryBlocks.of(1, rows, self.shape.device)

    def queries(self, blocks: QueryBlocks) -> Tensor:
        """[T, H, D]"""
        return self.shape.noise(sum(row.count for row in blocks.rows), self.shape.query_heads)

    def dense(self, blocks: QueryBlocks) -> SparseIndex:
        """Every page up to each block's last."""
        shape = self.shape.kv_heads, len(blocks), self.kv.table.shape[1]
        return build_index(Proposal(torch.ones(shape, dtype=torch.bool, device=self.shape.device)), self.kv, blocks)

    def masses(self, blocks: QueryBlocks) -> Tensor:
        """[G, N, L], noise for past pages."""
        page = torch.arange(self.kv.table.shape[1], device=self.shape.device)
        past = page < (blocks.origin // PAGE_SIZE)[:, None]
        noise = torch.rand(self.shape.kv_heads, *past.shape, device=self.shape.device) * past
        return noise / noise.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def sparse(self, blocks: QueryBlocks, masses: Tensor, budget: Budget) -> tuple[Tensor, SparseIndex]:
        """The mask [G, N, L] that the budget admits, and the index of it."""
        mask = budget.pages(masses, self.kv, blocks)
        return mask, build_index(Proposal(mask), self.kv, blocks)
