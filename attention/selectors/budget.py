"""How much of what was scored is read."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.kernels.choose import choose_count, choose_mass
from gossamer.kernels.layout import NULL_PAGE, PagedKV, QueryBlocks


@dataclass(frozen=True, slots=True)
class Budget:
    """A count of tokens, a share of the keys that the block may see, the smallest set of pages that holds a mass, the
    pages that score at least a part of the best one (FlashPrefill's alpha), or those of at least some weight
    (SeerAttention's threshold; the longer the sequence, the fewer reach it).

    Count and share include what every block reads anyway: the first page, its own, and those of the `recent` tokens
    before it, which no estimate has to find. Otherwise, at least `least` tokens are read.
    """

    kind: Literal["tokens", "share", "mass", "part", "weight"]
    value: float
    least: int = 0  # tokens
    recent: int = 0  # tokens before the block, rounded up to pages

    def __post_init__(self) -> None:
        if self.kind == "tokens" and (self.value < 1 or self.value != int(self.value)):
            raise ValueError(f"a budget of tokens must be a whole number of at least 1, not {self.value}.")
        if self.kind != "tokens" and not 0.0 < self.value <= 1.0:
            raise ValueError(f"a budget by {self.kind} must be above 0 and at most 1, not {self.value}.")
        if self.least < 0 or self.recent < 0:
            raise ValueError(f"a budget's least and recent tokens cannot be {self.least} and {self.recent}.")

    def pages(self, mass: Tensor, kv: PagedKV, blocks: QueryBlocks) -> Tensor:
        """mass [G, N, L] over past pages -> which of them to read [G, N, L] bool."""
        own = (blocks.pos + blocks.count - 1) // kv.page_size - blocks.origin // kv.page_size + 1  # [N]
        near = self._near(kv, blocks) if self.recent else None
        if self.kind == "mass":
            chosen = choose_mass(mass, self.value)
        elif self.kind == "part":
            chosen = (mass >= self.value * mass.amax(-1, keepdim=True)) & (mass > 0)
        elif self.kind == "weight":
            chosen = mass >= self.value
        else:
            chosen = self._count(mass, self._wanted(kv, blocks) - own, near, kv, blocks)
        if self.least:
            chosen = chosen | self._count(mass, -(-self.least // kv.page_size) - own, near, kv, blocks)
        return chosen if near is None else chosen | near

    def _near(self, kv: PagedKV, blocks: QueryBlocks) -> Tensor:
        """[N, L] bool, the resident pages of the `recent` tokens before each block."""
        first = blocks.origin // kv.page_size
        page = torch.arange(kv.table.shape[1], device=kv.table.device)
        reach = (first - -(-self.recent // kv.page_size))[:, None]
        return (page >= reach) & (page < first[:, None]) & (kv.table[blocks.seq.long()] != NULL_PAGE)

    def _wanted(self, kv: PagedKV, blocks: QueryBlocks) -> Tensor:
        """[N], pages to read in all."""
        if self.kind == "tokens":
            return torch.full_like(blocks.pos, -(-int(self.value) // kv.page_size))
        seen = (blocks.pos + blocks.count - 1) // kv.page_size + 1
        return (seen * self.value).ceil().int()

    def _count(self, mass: Tensor, keep: Tensor, near: Tensor | None, kv: PagedKV, blocks: QueryBlocks) -> Tensor:
        """The first page and those near, which are always read, count as the best; a past page of no weight can still
        be taken."""
        page = torch.arange(kv.table.shape[1], device=mass.device)
        past = (page < (blocks.origin // kv.page_size)[:, None]) & (kv.table[blocks.seq.long()] != NULL_PAGE)
        ranked = torch.where(past, mass.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        if near is not None:
            ranked = torch.where(near, 2.0, ranked)
        ranked[..., 0] = torch.where(ranked[..., 0] > 0, 3.0, 0.0)
        return choose_count(ranked, keep.clamp(min=0).int().expand(mass.shape[:-1]))
