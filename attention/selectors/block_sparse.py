"""Pages by the softmax weight that an estimate gives them: block-sparse attention."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gossamer.attention.selectors.base import CORRECTION, Proposal
from gossamer.attention.selectors.budget import Budget
from gossamer.kernels.antidiagonal import antidiagonal_mass
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.score_pages import bound_mass, page_mass
from gossamer.kvcache.summaries import KeyBounds, MeanKeys, Summary

MEAN, BOUNDS = MeanKeys(), KeyBounds()


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """The pages that `budget` admits, by one of three scores.

    mean: each query against the mean key of each page (FlashPrefill, 2026; centroid selection in decode). bounds: the
    largest product that a query can have with a key in each quarter of a page (Quest, Tang et al. 2024; LServe's 16 in
    64). antidiagonal: sums of products along antidiagonals of stride x stride tiles (XAttention, Xu et al. 2025); it
    reads the keys themselves, an eighth or sixteenth of the work of dense attention.
    """

    budget: Budget
    score: Literal["mean", "bounds", "antidiagonal"] = "mean"
    stride: int = 16  # of antidiagonals
    above: int = 0
    corrects: bool = False

    reads_tensors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.stride not in (4, 8, 16, 32):
            raise ValueError(f"antidiagonals have a stride of 4, 8, 16 or 32, not {self.stride}.")

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """The table that the score needs, and means for the correction."""
        tables: list[Summary] = [*CORRECTION] if self.corrects else []
        if self.score == "mean" and MEAN not in tables:
            tables.append(MEAN)
        if self.score == "bounds":
            tables.append(BOUNDS)
        return tuple(tables)

    @property
    def scored_by(self) -> Hashable:
        """Equal for selectors whose masses are equal."""
        return self.score, self.stride if self.score == "antidiagonal" else 0

    def mass(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Tensor:
        """[G, N, L], the softmax weight of each past page by the score."""
        if self.score == "mean":
            return page_mass(q, kv, blocks, kv.summaries[MEAN.name], scale=scale)
        if self.score == "bounds":
            return bound_mass(q, kv, blocks, kv.summaries[BOUNDS.name], scale=scale)
        return antidiagonal_mass(q, kv, blocks, self.stride, scale=scale)

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        """Scores, then the budget."""
        return Proposal(self.budget.pages(self.mass(q, kv, blocks, scale), kv, blocks))
