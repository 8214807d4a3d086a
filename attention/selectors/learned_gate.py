"""Pages by a small trained gate (SeerAttention, Gao et al. 2024, for prompts; SeerAttention-R, 2025, for decoding)."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.attention.selectors.base import CORRECTION, Proposal
from gossamer.attention.selectors.budget import Budget
from gossamer.kernels.gates import gate_queries
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.score_pages import page_mass
from gossamer.kvcache.summaries import GateKeys, Summary


@dataclass(frozen=True, slots=True)
class LearnedGate:
    """Gate queries of a block against the gate keys of the pages; the budget then chooses among their softmax weights.

    query [KV heads of the layer, J, ratio * D, E]: J gate queries, each projected from the group's queries, which are
    averaged over the block and rotated back to before RoPE. A gate of SeerAttention has one gate query per query head
    (block-diagonal in `ratio`), and may have a key of each page for each of them; one of SeerAttention-R has one query
    for the whole group.
    """

    keys: GateKeys
    budget: Budget
    query: Tensor = field(compare=False, repr=False)
    norm: Tensor | None = field(compare=False, repr=False)  # [E]
    phase: str = "prefill"  # which of the source's gates this is
    above: int = 0
    corrects: bool = False

    reads_tensors: ClassVar[bool] = True

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """The gate's key of each page."""
        return (self.keys, *(CORRECTION if self.corrects else ()))

    @property
    def scored_by(self) -> Hashable:
        """Equal for selectors whose masses are equal."""
        return self.keys.source, self.keys.layer

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        """Scores, then the budget."""
        return Proposal(self.budget.pages(self.mass(q, kv, blocks, scale), kv, blocks))

    def mass(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Tensor:
        """[G, N, L], the softmax weight that the gate gives each past page: its query takes the place of the block's.
        `scale` is that of attention, which a gate has no use for."""
        rotary, turned = self.keys.rotary, self.keys.turned
        gate = gate_queries(q, kv, blocks, self.query, self.norm, rotary, turned)
        rows = tuple(row._replace(token=n, count=1) for n, row in enumerate(blocks.rows))
        token = torch.arange(len(rows), dtype=torch.int32, device=q.device)
        count = blocks.count if blocks.size == 1 else torch.ones_like(token)
        pooled = replace(blocks, rows=rows, token=token, count=count)
        return self._mass(gate, replace(kv, ratio=self.query.shape[1]), pooled, kv.summaries[self.keys.name])

    def _mass(self, gate: Tensor, kv: PagedKV, pooled: QueryBlocks, keys: Tensor) -> Tensor:
        """gate [N, KV heads * J, E], keys [G, P, K, E] -> [G, N, L]"""
        scale, count = self.query.shape[3] ** -0.5, keys.shape[2]
        if count == 1:
            return page_mass(gate, kv, pooled, keys[:, :, 0], scale=scale)
        own, single = gate.unflatten(1, (-1, count)), replace(kv, ratio=1)
        masses = [
            page_mass(own[:, :, j].contiguous(), single, pooled, keys[:, :, j], scale=scale) for j in range(count)
        ]
        largest = torch.stack(masses).amax(0)
        return largest / largest.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
