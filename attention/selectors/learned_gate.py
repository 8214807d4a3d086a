"""Pages by a small trained gate (SeerAttention, Gao et al. 2024, for prompts; SeerAttention-R, 2025, for decoding)."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.attention.selectors.base import CORRECTION, Proposal
from gossamer.attention.selectors.budget import Budget
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
        """[G, N, L], the softmax weight that the gate gives each past page. One row per block takes the place of its
        queries. `scale` is that of attention, which a gate has no use for."""
        gate = self._queries(q, kv, blocks)
        rows = tuple(row._replace(token=n, count=1) for n, row in enumerate(blocks.rows))
        token = torch.arange(len(rows), dtype=torch.int32, device=q.device)
        pooled = replace(blocks, rows=rows, token=token, count=torch.ones_like(token))
        heads = torch.arange(kv.heads.numel(), dtype=torch.int32, device=q.device)
        view = replace(kv, heads=heads, ratio=self.query.shape[1])
        return self._mass(gate, view, pooled, kv.summaries[self.keys.name])

    def _mass(self, gate: Tensor, kv: PagedKV, pooled: QueryBlocks, keys: Tensor) -> Tensor:
        """gate [N, G * J, E], keys [G, P, K, E] -> [G, N, L]"""
        scale, count = self.query.shape[3] ** -0.5, keys.shape[2]
        if count == 1:
            return page_mass(gate, kv, pooled, keys[:, :, 0], scale=scale)
        own, single = gate.unflatten(1, (-1, count)), replace(kv, ratio=1)
        masses = [
            page_mass(own[:, :, j].contiguous(), single, pooled, keys[:, :, j], scale=scale) for j in range(count)
        ]
        largest = torch.stack(masses).amax(0)
        return largest / largest.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def _queries(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks) -> Tensor:
        """[N, G * J, E]"""
        own = kv.heads.long()
        heads = (own[:, None] * kv.ratio + torch.arange(kv.ratio, device=q.device)).flatten()
        within = torch.arange(blocks.size, device=q.device)
        token = blocks.token[:, None] + torch.minimum(within, blocks.count[:, None] - 1)  # [N, size]
        position = blocks.pos[:, None] + torch.minimum(within, blocks.count[:, None] - 1)
        plain = self.keys.rotary.turn(
            q[token.long()[:, :, None], heads], position[:, :, None].expand(-1, -1, heads.numel()), back=True
        )
        real = (within < blocks.count[:, None])[:, :, None, None]
        mean = (plain * real).sum(1) / blocks.count[:, None, None]  # [N, G * ratio, D]
        grouped = mean.unflatten(1, (own.numel(), kv.ratio)).flatten(2)  # [N, G, ratio * D]
        gate = torch.einsum("ngd,gjde->ngje", grouped, self.query[own].float()).flatten(1, 2)
        if self.norm is not None:
            gate = torch.nn.functional.rms_norm(gate, self.norm.shape, self.norm.float(), 1e-6)
        return self.keys.turned.turn(gate, blocks.origin[:, None].expand(gate.shape[:2]))
