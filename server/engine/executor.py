"""Runs steps: the scheduler's parts become tensors, the model's logits become sampled tokens.

A step is launched and, when its results have come back, collected. In between the next one can be launched: the tokens
that it feeds to the model are taken from the step before on the device.
"""

import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from gossamer.attention.policy import OperatingPoint
from gossamer.attention.quality import QualitySampler
from gossamer.attention.reads import Reads, SpanReads, totals
from gossamer.attention.second_look import Quality, Watch
from gossamer.attention.step import Span, Step, plan_step
from gossamer.kernels.layout import BlockRow
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.retention import Retention
from gossamer.kvcache.table import PageTable
from gossamer.server.engine.graphs import DecodeGraphs, Token
from gossamer.server.engine.logits import Turn
from gossamer.server.engine.model import Model
from gossamer.server.engine.quality import Checked
from gossamer.server.engine.sampler import Draw, Sampled, Sampler, read_scores
from gossamer.server.engine.scheduler import Part
from gossamer.server.engine.sequence import Sequence
from gossamer.server.engine.transfer import CopyOut, Unread, numbers_to_device

BlockRows = tuple[tuple[BlockRow, ...], tuple[BlockRow, ...]]  # a step's query blocks: prompts', and generated tokens'
_Forward = tuple[Tensor, Reads, BlockRows, Watch | None]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device was given. Its results are on their way to the host."""

    spans: int
    choices: Mapping[Sequence, int]  # whose next tokens it chooses, and where they lie among these
    draw: Draw | None  # these tokens
    scored: tuple[Sequence, ...]  # parts of whose prompts it scores
    blocks: BlockRows
    heads: Mapping[bool, int]
    copy: CopyOut  # what was read, by whether it is decode; "draw": its table; "watch": checks; by sequence: scores
    watch: Watch | None
    model_seconds: float
    select_seconds: float
    attend_seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step produced."""

    sampled: dict[Sequence, Sampled]
    reads: tuple[SpanReads, ...]  # one per part
    not_finite: frozenset[Sequence] = frozenset()  # whose prompts cannot be scored
    checked: tuple[Checked, ...] = ()


class _Rows(NamedTuple):
    """Token rows whose logits are needed, and where among them a part's are: the first one to score, the one to sample
    after."""

    rows: list[int]
    choosing: list[tuple[Part, int]]
    scoring: list[tuple[Part, int]]


@dataclass(slots=True)
class Executor:
    """Model, cache and sampler, run by the engine thread."""

    model: Model
    cache: KVCache
    sampler: Sampler
    graphs: DecodeGraphs | None = None
    quality: QualitySampler | None = None

    def launch(self, parts: Items[Part], before: Launched | None = None) -> Launched:
        """One forward pass over all parts, laid end to end, and the choice of their next tokens. On a GPU it returns
        when these were launched. `before`: the step launched last, where it chose tokens that the host has not read.
        """
        wanted, unread = _rows(parts), _unread(parts, before)
        began = time.monotonic()
        # A recorded step cannot be looked into.
        looks = self.quality is not None and self.quality.generated(p.sequence.point for p in parts if _generates(p))
        replayed = None if looks else self._replay(parts, unread)
        logits, reads, blocks, watch = replayed or self._forward(parts, wanted.rows, unread, looks)
        seconds = time.monotonic() - began
        out = dict[object, Tensor]()
        for kind, pages in reads.read.items():
            out[kind] = pages
        draw = self._draw(logits, wanted, before)
        if draw is not None:
            out["draw"] = draw.table
        if watch is not None and watch.made:
            out["watch"] = watch.found
        for part, at in wanted.scoring:
            out[part.sequence] = self._score(part, logits[at : at + part.new])
        return Launched(
            spans=len(parts),
            choices={part.sequence: n for n, (part, _) in enumerate(wanted.choosing)},
            draw=draw,
            scored=tuple(part.sequence for part, _ in wanted.scoring),
            blocks=blocks,
            heads=reads.heads,
            copy=CopyOut(out),
            watch=watch,
            model_seconds=seconds,
            select_seconds=reads.select_seconds,
            attend_seconds=reads.attend_seconds,
        )

    def collect(self, launched: Launched) -> Outcome:
        """Wait for a step's results. Log-probabilities of prompts go into their sequences."""
        found, draw = launched.copy.read(), launched.draw
        not_finite = set()
        for sequence in launched.scored:
            scores = read_scores(found[sequence])
            if scores is None:
                not_finite.add(sequence)
            else:
                sequence.prompt_logprobs = [*(sequence.prompt_logprobs or [None]), *scores]
        sampled = dict(zip(launched.choices, draw.read(found["draw"]), strict=True)) if draw is not None else {}
        read = {kind: found[kind] for kind in launched.heads}
        reads = totals(read, launched.heads, *launched.blocks, launched.spans)
        checked = _checked(launched.watch, found["watch"].tolist() if "watch" in found else [])
        return Outcome(sampled, reads, frozenset(not_finite), checked)

    def warm_up(self, point: OperatingPoint, rules: Items[Retention], tokens: int) -> None:
        """Compute a prompt of so many tokens and one token more, so that what they need is compiled, and forget it."""
        table = self.cache.table(rules, b"")
        try:
            for span in (Span(0, tokens, tokens), Span(tokens, 1, tokens)):
                self.cache.grow(table, span.new)
                self._compute([span], [table], [point], [0] * span.new, [span.new - 1])
        finally:
            self.cache.drop(table)

    def _forward(self, parts: Items[Part], rows: list[int], unread: Unread | None, looks: bool) -> _Forward:
        """Logits of these token rows [len(rows), V]. looks: at one of the generated tokens twice."""
        tables = [part.sequence.table for part in parts]
        spans = [Span(part.first, part.new, part.sequence.prompt_length) for part in parts]
        points = [part.sequence.point for part in parts]
        tokens = [t for part in parts for t in _tokens(part)]
        logits, step = self._compute(spans, tables, points, tokens, rows, unread, looks)
        prefill, decode = (blocks.rows if blocks is not None else () for blocks in (step.prefill, step.decode))
        return logits, step.reads, (prefill, decode), step.watch

    def _compute(
        self,
        spans: Items[Span],
        tables: Items[PageTable],
        points: Items[OperatingPoint],
        tokens: list[int],
        rows: list[int],
        unread: Unread | None = None,
        looks: bool | None = None,
    ) -> tuple[Tensor, Step]:
        device = self.model.device
        step = plan_step(spans, self.cache.views(tables), points, self.model.shape.ratio, device)
        if self.quality is not None and looks is not None:
            step = replace(step, watch=self.quality.choose(step, tables, looks))
        inputs = numbers_to_device([tokens, _positions(spans)], device)
        if unread is not None:
            unread.put(inputs[0])
        return self.model.forward(inputs[0], inputs[1], step, numbers_to_device(rows, device)), step

    def _replay(self, parts: Items[Part], unread: Unread | None) -> _Forward | None:
        """The same by a recorded graph, where every sequence has one generated token to compute."""
        if self.graphs is None or not all(_generates(part) for part in parts):
            return None
        tokens = [Token(_tokens(part)[0], part.first, part.sequence.point, part.sequence.table) for part in parts]
        found = self.graphs.run(tokens, unread)
        if found is None:
            return None
        return *found, ((), tuple(BlockRow(n, n, token.pos, 1) for n, token in enumerate(tokens))), None

    def _draw(self, logits: Tensor, wanted: _Rows, before: Launched | None) -> Draw | None:
        """The next tokens of the sequences that are due one."""
        if not wanted.choosing:
            return None
        if len(wanted.choosing) < len(wanted.rows):
            logits = logits[numbers_to_device([row for _, row in wanted.choosing], self.model.device)]
        turns = [Turn(part.sequence.row, _place(part.sequence, before)) for part, _ in wanted.choosing]
        tokens = before.draw.tokens if before is not None and before.draw is not None else None
        return self.sampler.draw(logits, turns, tokens)

    def _score(self, part: Part, logits: Tensor) -> Tensor:
        """Log-probabilities of the prompt tokens that follow the part's positions and have none yet."""
        sequence, top = part.sequence, part.sequence.request.prompt_logprobs
        assert top is not None
        known = max(1, len(sequence.prompt_logprobs))
        skip = max(0, known - 1 - part.first)  # positions scored before a preemption
        stop = min(part.first + part.new, sequence.prompt_length - 1)
        wanted = sequence.tokens[part.first + skip + 1 : stop + 1]
        return self.sampler.score(logits[skip : skip + len(wanted)], wanted, top)


def _rows(parts: Items[Part]) -> _Rows:
    found = _Rows([], [], [])
    token = 0
    for part in parts:
        if part.sequence.lacks_prompt_logprobs and part.first < part.sequence.prompt_length:
            found.scoring.append((part, len(found.rows)))
            found.rows.extend(range(token, token + part.new))
        elif part.samples:
            found.rows.append(token + part.new - 1)
        if part.chooses:
            found.choosing.append((part, len(found.rows) - 1))
        token += part.new
    return found if found.rows else found._replace(rows=[token - 1])


def _unread(parts: Items[Part], before: Launched | None) -> Unread | None:
    """Which of the step's tokens only the device knows."""
    places, at, token = list[int](), list[int](), -1
    for part in parts:
        token += part.new
        place = _place(part.sequence, before)
        if place is not None:
            places.append(place)
            at.append(token)
    if not at:
        return None
    assert before is not None and before.draw is not None
    return Unread(before.draw.tokens, places, at)


def _place(sequence: Sequence, before: Launched | None) -> int | None:
    """Where the newest token of a sequence lies in the step before, unless the host knows it."""
    if sequence.unread == 0:
        return None
    assert sequence.unread == 1 and before is not None, "a token is lost"
    return before.choices[sequence]


def _tokens(part: Part) -> list[int]:
    """What is fed to the model; 0 for the token that is unread."""
    known = part.sequence.tokens[part.first : part.first + part.new]
    return known + [0] * (part.new - len(known))


def _checked(watch: Watch | None, numbers: Items[Items[float]]) -> tuple[Checked, ...]:
    """What came of a step's checks. Those for which everything was read say nothing."""
    if watch is None:
        return ()
    qualities = [Quality(*each) if all(map(math.isfinite, each)) else None for each in numbers]
    made = (Checked(c, q) for c, q in zip(watch.made, qualities, strict=True) if q is None or q.density < 1)
    return *made, *(Checked(check, None) for check in watch.blind)


def _generates(part: Part) -> bool:
    """Whether it is the newest token of a sequence, behind its prompt."""
    return part.new == 1 and part.samples and part.first >= part.sequence.prompt_length


def _positions(spans: Items[Span]) -> list[int]:
    return [position for span in spans for position in range(span.first, span.first + span.new)]
