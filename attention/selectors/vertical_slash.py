"""Columns and diagonals of the attention map (MInference, Jiang et al. 2024; FlexPrefill, Lai et al. 2025)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.attention.selectors.base import Proposal
from gossamer.kernels.choose import choose_tokens
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.probe import probe_mass
from gossamer.kvcache.summaries import Summary


@dataclass(frozen=True, slots=True)
class VerticalSlash:
    """The `columns` keys and the `diagonals` distances that the last `probe` queries of a sequence's chunk attend to
    most. A column is a single token, for all queries behind it; a diagonal is rounded out to pages.

    With mass < 1 the sizes are limits, and the smallest sets are taken that hold this part of the probe's attention
    (FlexPrefill's adaptive sizes). For prompts only: a generated token is its own probe, and nothing is saved.
    """

    columns: int
    diagonals: int
    probe: int = 64
    mass: float = 1.0
    above: int = 0

    reads_tensors: ClassVar[bool] = True
    corrects: ClassVar[bool] = False
    summaries: ClassVar[tuple[Summary, ...]] = ()

    def __post_init__(self) -> None:
        if min(self.columns, self.diagonals) < 0 or self.probe < 1 or not 0.0 < self.mass <= 1.0:
            raise ValueError(
                "vertical-slash needs columns and diagonals of at least 0, a probe of at least 1 and a mass above 0 "
                f"and at most 1, not {self.columns}, {self.diagonals}, {self.probe} and {self.mass}."
            )

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        """Each chunk is probed by its own last queries, so chunked prompts and prefix hits need no special care."""
        columns, diagonals = probe_mass(q, kv, blocks, self.probe, scale=scale)  # [G, B, L * S]
        seq = blocks.seq.long()
        tokens = choose_tokens(columns, self.columns, self.mass)[:, seq]  # [G, N, K]
        distances = choose_tokens(diagonals, self.diagonals, self.mass)  # [G, B, K]
        return Proposal(self._pages(distances, kv, blocks), tokens)

    def _pages(self, distances: Tensor, kv: PagedKV, blocks: QueryBlocks) -> Tensor:
        """distances [G, B, K] -> [G, N, L] bool: pages that a chosen diagonal of the block's queries runs through."""
        size, (pages, length) = kv.page_size, (kv.table.shape[1], kv.table.shape[1] * kv.page_size)
        marked = torch.zeros(*distances.shape[:2], length + 1, dtype=torch.int32, device=distances.device)
        marked.scatter_(-1, torch.where(distances < 0, length, distances).long(), 1)
        before = torch.nn.functional.pad(marked[..., :length].cumsum(-1, dtype=torch.int32), (1, 0))  # chosen below o
        first = torch.arange(pages, device=distances.device) * size  # [L]
        low = (blocks.pos[:, None] - first - size + 1).clamp(0, length)  # [N, L]: least distance into the page
        high = (blocks.pos[:, None] + blocks.count[:, None] - first).clamp(0, length)  # one more than the largest
        own = blocks.seq[:, None].long() * (length + 1)
        flat = before.flatten(1)
        return flat[:, own + high] > flat[:, own + low]
