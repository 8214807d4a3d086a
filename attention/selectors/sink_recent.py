"""The first tokens and the most recent ones (StreamingLLM, Xiao et al. 2023; A-shape in MInference)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.attention.selectors.base import Proposal
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kvcache.summaries import Summary


@dataclass(frozen=True, slots=True)
class SinkRecent:
    """Reads the pages that hold the first `sink` tokens or one of the `recent` tokens up to the query.

    Rounded up to whole pages. It frees no memory; the retention rule `KeepSinkRecent` does, and is exact to the token.
    """

    sink: int  # tokens
    recent: int  # tokens, the query's own included

    reads_tensors: ClassVar[bool] = False
    above: ClassVar[int] = 0
    corrects: ClassVar[bool] = False
    summaries: ClassVar[tuple[Summary, ...]] = ()

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise ValueError(
                f"sink-recent needs sink >= 0 and recent >= 1, not sink {self.sink} and recent {self.recent}."
            )

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        """Counted from the tile's origin, so that the answer does not depend on how the prompt was cut into chunks."""
        first = torch.arange(kv.table.shape[1], device=kv.table.device) * kv.page_size  # [L]
        recent = first + kv.page_size > (blocks.origin + 1 - self.recent)[:, None]  # [N, L]
        pages = (first < self.sink) | recent
        return Proposal(pages.expand(kv.heads.numel(), -1, -1))
