"""How much of what it could see a step's attention has read: the density that is reported and exported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels.layout import PAGE_SIZE, BlockRow, QueryBlocks, SparseIndex


class SpanReads(NamedTuple):
    """Of one sequence in one step: queries x heads x pages, over all layers (a single token is 1/64 of a page)."""

    prefill_read: float
    prefill_possible: float
    decode_read: float
    decode_possible: float

    def plus(self, other: "SpanReads") -> "SpanReads":
        """The same sequence, one step later."""
        return SpanReads(*(mine + more for mine, more in zip(self, other, strict=True)))


@dataclass(slots=True)
class Reads:
    """Adds up over the layers of one step. What was read stays on the device; `totals` says whose it is."""

    read: dict[bool, Tensor] = field(default_factory=dict)  # pages of a query, by whether it is decode: [N]
    heads: dict[bool, int] = field(default_factory=dict)  # that were added up
    select_seconds: float = 0.0  # spent choosing keys; on a CPU only, where calls return when they are done
    attend_seconds: float = 0.0  # ... and reading them
    _known: dict[int, tuple[SparseIndex, Tensor]] = field(default_factory=dict)  # indices shared by layers

    def add(self, blocks: QueryBlocks, index: SparseIndex) -> None:
        """What one view's heads read for a query of each of these blocks."""
        decode, heads = blocks.size == 1, index.count.shape[0]
        known = self._known.get(id(index))
        if known is None:
            pages = index.count.sum(0, dtype=torch.float32)
            if index.token_count is not None:
                pages.add_(index.token_count.sum(0), alpha=1 / PAGE_SIZE)
            known = self._known[id(index)] = index, pages
        if decode in self.read:
            self.read[decode] += known[1]
        else:
            self.read[decode] = known[1].clone()
        self.heads[decode] = self.heads.get(decode, 0) + heads


def totals(
    read: Mapping[bool, Tensor],
    heads: Mapping[bool, int],
    prefill: Sequence[BlockRow],
    decode: Sequence[BlockRow],
    spans: int,
) -> tuple[SpanReads, ...]:
    """One entry per sequence of a step, from what its `Reads` hold, `read` being on the host by now. What was added for
    more blocks than there are rows does not count."""
    sums = [[0.0] * 4 for _ in range(spans)]
    for at, rows in ((0, prefill), (2, decode)):
        kind = at == 2
        if not rows or kind not in read:
            continue
        for row, pages in zip(rows, read[kind].tolist(), strict=False):
            sums[row.seq][at] += pages * row.count
            sums[row.seq][at + 1] += heads[kind] * row.count * -(-(row.pos + row.count) // PAGE_SIZE)
    return tuple(SpanReads(*each) for each in sums)
