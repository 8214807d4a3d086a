"""Single tokens by a few channels of their keys (DoubleSparse, Yang et al. 2024; by mass as in Twilight, 2025)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.attention.selectors.base import Proposal
from gossamer.kernels.choose import choose_tokens
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.score_tokens import label_mass
from gossamer.kvcache.summaries import Labels, Summary


@dataclass(frozen=True, slots=True)
class DoubleSparsity:
    """The `tokens` keys with the largest products with the query over the label channels, attended to exactly. With
    mass < 1 only as many of them as hold this part of the estimated weight. For generated tokens."""

    labels: Labels
    tokens: int
    mass: float = 1.0
    above: int = 0

    reads_tensors: ClassVar[bool] = True
    corrects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0.0 < self.mass <= 1.0:
            raise ValueError(
                "double-sparsity needs at least 1 token and a mass above 0 and at most 1, not "
                f"{self.tokens} and {self.mass}."
            )

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """The label channels of every key."""
        return (self.labels,)

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        """Pages none but those that every block reads."""
        table = kv.summaries[self.labels.name]
        mass = label_mass(q, kv, blocks, table, self.labels.of(kv), scale=scale)
        pages = torch.zeros(*mass.shape[:2], kv.table.shape[1], dtype=torch.bool, device=mass.device)
        return Proposal(pages, choose_tokens(mass, self.tokens, self.mass))
