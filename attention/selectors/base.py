"""What every selector is."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kvcache.summaries import MeanKeys, MeanValues, Summary

CORRECTION = (MeanKeys(), MeanValues())  # what a selector that `corrects` has to know of full pages


@dataclass(frozen=True, slots=True)
class Proposal:
    """Keys that a selector wants read: whole pages, and single tokens where the method is finer than a page."""

    pages: Tensor  # [G, N, L] bool, logical pages
    tokens: Tensor | None = None  # [G, N, K] int32 positions, ascending, -1 as padding


class Selector(Protocol):
    """Answers "which keys should this query block read?" for the heads of one view. Selectors are values: equal ones
    are asked together."""

    reads_tensors: ClassVar[bool]  # False: the answer depends on positions alone, so all layers share it

    @property
    def above(self) -> int:
        """Query blocks that begin before this position are dense, and the selector is not asked about them."""
        ...

    @property
    def corrects(self) -> bool:
        """Whether pages that are not read count through their mean key and value."""
        ...

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """What it has to know of full pages."""
        ...

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        """q [T, H, D] -> proposal for every head of `kv` and every block. scale: of the logits q . k."""
        ...
