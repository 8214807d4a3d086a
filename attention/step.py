"""A step: one forward pass over some sequences, each with some new tokens, cut into query blocks on the host."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.attention.policy import OperatingPoint
from gossamer.attention.reads import Reads
from gossamer.attention.second_look import Watch
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, QueryBlocks, SparseIndex
from gossamer.kvcache.cache import StepViews
from gossamer.kvcache.summaries import FilledPages

TILE_ROWS = 128  # query heads of one KV head x positions: what one prefill program computes


class Span(NamedTuple):
    """One sequence's part of a step: positions first ... first + new - 1."""

    first: int
    new: int
    prompt: int  # length of the prompt: positions below it ask the prefill selector, the others the decode selector


@dataclass(frozen=True, slots=True)
class Step:
    """All that attention has to know about one forward pass. `views` and `points` have one entry per span.

    A step that is recorded for other sequences to come (`recorded`) has generated tokens alone, and its `points` are
    all that may occur. Its tensors are what they will be filled with: nothing may follow from what `spans` and `rows`
    say, and a block of no query is a place that is free.
    """

    spans: tuple[Span, ...]
    prefill: QueryBlocks | None
    decode: QueryBlocks | None
    views: StepViews
    points: tuple[OperatingPoint, ...]
    filled: FilledPages | None = None
    reads: Reads = field(default_factory=Reads, compare=False, repr=False)
    shared: dict[Hashable, SparseIndex] = field(default_factory=dict, compare=False, repr=False)
    """Indices that depend on positions alone, made by the first layer that needs them and used by the others."""
    places: dict[Hashable, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Which blocks a selector is asked about, likewise."""
    recorded: Mapping[OperatingPoint, Tensor] | None = None  # per point [B] bool: the sequences that asked for it
    watch: Watch | None = field(default=None, compare=False, repr=False)  # what looks twice

    @property
    def num_tokens(self) -> int:
        return sum(span.new for span in self.spans)

    @property
    def blocks(self) -> tuple[QueryBlocks, ...]:
        return tuple(blocks for blocks in (self.prefill, self.decode) if blocks is not None)


def plan_step(
    spans: Sequence[Span],
    views: StepViews,
    points: Sequence[OperatingPoint],
    ratio: int,
    device: torch.device | str = "cpu",
) -> Step:
    """Cut spans, laid end to end, into tiles of TILE_ROWS // ratio positions (prompt) and of one (generated)."""
    size = max(1, TILE_ROWS // ratio)
    tiles: list[BlockRow] = []
    single: list[BlockRow] = []
    token = 0
    for seq, span in enumerate(spans):
        stop = span.first + span.new
        pos, prompt_stop = span.first, min(stop, span.prompt)
        while pos < prompt_stop:
            end = min(pos // size * size + size, prompt_stop)
            tiles.append(BlockRow(seq, token + pos - span.first, pos, end - pos))
            pos = end
        single.extend(BlockRow(seq, token + at - span.first, at, 1) for at in range(pos, stop))
        token += span.new
    return Step(
        tuple(spans),
        QueryBlocks.of(size, tiles, device) if tiles else None,
        QueryBlocks.of(1, single, device) if single else None,
        views,
        tuple(points),
        _filled(spans, device),
    )


def _filled(spans: Sequence[Span], device: torch.device | str) -> FilledPages | None:
    """The pages that are full once the step's keys are stored, and were not before."""
    pairs = [
        (seq, page)
        for seq, span in enumerate(spans)
        for page in range(span.first // PAGE_SIZE, (span.first + span.new) // PAGE_SIZE)
    ]
    return FilledPages.of(pairs, device) if pairs else None
