"""Dense attention: every page."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.attention.selectors.base import Proposal
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kvcache.summaries import Summary


@dataclass(frozen=True, slots=True)
class Dense:
    """Reads every page that the head's retention rule lets it see."""

    reads_tensors: ClassVar[bool] = False
    above: ClassVar[int] = 0
    corrects: ClassVar[bool] = False
    summaries: ClassVar[tuple[Summary, ...]] = ()

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        """All pages, for every head and block."""
        shape = kv.heads.numel(), len(blocks), kv.table.shape[1]
        return Proposal(torch.ones(shape, dtype=torch.bool, device=kv.table.device))
