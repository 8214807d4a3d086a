"""How much of what was scored is read."""

from dataclasses import dataclass

from torch import Tensor

from gossamer.kernels.choose import Kind, choose_pages
from gossamer.kernels.layout import PagedKV, QueryBlocks


@dataclass(frozen=True, slots=True)
class Budget:
    """A count of tokens, a share of the keys that the block may see, the smallest set of pages that holds a mass, the
    pages that score at least a part of the best one (FlashPrefill's alpha), or those of at least some weight
    (SeerAttention's threshold; the longer the sequence, the fewer reach it).

    Count and share include what every block reads anyway: the first page, its own, and those of the `recent` tokens
    before it, which no estimate has to find. Otherwise, at least `least` tokens are read.
    """

    kind: Kind
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
        return choose_pages(mass, kv, blocks, kind=self.kind, value=self.value, least=self.least, recent=self.recent)
