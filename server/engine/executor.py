"""Runs one step: the scheduler's parts become tensors, the model's logits become sampled tokens."""

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.attention.policy import OperatingPoint
from gossamer.attention.reads import Reads, SpanReads
from gossamer.attention.step import Span, Step, plan_step
from gossamer.kernels.layout import BlockRow
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.retention import Retention
from gossamer.kvcache.table import PageTable
from gossamer.server.engine.graphs import DecodeGraphs, Token
from gossamer.server.engine.model import Model
from gossamer.server.engine.request import TokenLogprob
from gossamer.server.engine.sampler import Sampled, Sampler
from gossamer.server.engine.scheduler import Part
from gossamer.server.engine.sequence import Sequence

BlockRows = tuple[tuple[BlockRow, ...], tuple[BlockRow, ...]]  # a step's query blocks: prompts', and generated tokens'


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step produced."""

    sampled: dict[Sequence, Sampled]
    model_seconds: float
    reads: tuple[SpanReads, ...]  # one per part
    select_seconds: float  # of model_seconds, on a CPU
    attend_seconds: float
    not_finite: frozenset[Sequence] = frozenset()  # whose prompts cannot be scored


@dataclass(slots=True)
class Executor:
    """Model, cache and sampler, run by the engine thread."""

    model: Model
    cache: KVCache
    sampler: Sampler
    graphs: DecodeGraphs | None = None

    def run(self, parts: Items[Part]) -> Outcome:
        """One forward pass over all parts, laid end to end."""
        rows, sampling, scoring = self._rows(parts)
        began = time.monotonic()
        logits, reads, seen = self._replay(parts) or self._forward(parts, rows)
        seconds = time.monotonic() - began
        not_finite = {part.sequence for part, at in scoring if not self._score(part, logits[at : at + part.new])}
        sampled: dict[Sequence, Sampled] = {}
        if sampling:
            chosen = (
                logits
                if len(sampling) == len(rows)
                else logits[_to_device([row for _, row in sampling], self.model.device)]
            )
            results = self.sampler.sample(chosen, [part.sequence.row for part, _ in sampling])
            sampled = {part.sequence: result for (part, _), result in zip(sampling, results, strict=True)}
        return Outcome(
            sampled,
            seconds,
            reads.totals(*seen, len(parts)),
            reads.select_seconds,
            reads.attend_seconds,
            frozenset(not_finite),
        )

    def warm_up(self, point: OperatingPoint, rules: Items[Retention], tokens: int) -> None:
        """Compute a prompt of so many tokens and one token more, so that what they need is compiled, and forget it."""
        table = self.cache.table(rules, b"")
        try:
            for span in (Span(0, tokens, tokens), Span(tokens, 1, tokens)):
                self.cache.grow(table, span.new)
                self._compute([span], [table], [point], [0] * span.new, [span.new - 1])
        finally:
            self.cache.drop(table)

    def _forward(self, parts: Items[Part], rows: list[int]) -> tuple[Tensor, Reads, BlockRows]:
        """Logits of these token rows [len(rows), V]."""
        tables = [part.sequence.table for part in parts]
        spans = [Span(part.first, part.new, part.sequence.prompt_length) for part in parts]
        points = [part.sequence.point for part in parts]
        tokens = [t for part in parts for t in part.sequence.tokens[part.first : part.first + part.new]]
        logits, step = self._compute(spans, tables, points, tokens, rows)
        prefill, decode = (blocks.rows if blocks is not None else () for blocks in (step.prefill, step.decode))
        return logits, step.reads, (prefill, decode)

    def _compute(
        self,
        spans: Items[Span],
        tables: Items[PageTable],
        points: Items[OperatingPoint],
        tokens: list[int],
        rows: list[int],
    ) -> tuple[Tensor, Step]:
        device = self.model.device
        step = plan_step(spans, self.cache.views(tables), points, self.model.shape.ratio, device)
        inputs = _to_device([tokens, _positions(spans)], device)
        return self.model.forward(inputs[0], inputs[1], step, _to_device(rows, device)), step

    def _replay(self, parts: Items[Part]) -> tuple[Tensor, Reads, BlockRows] | None:
        """The same by a recorded graph, where every sequence has one generated token to compute."""
        if self.graphs is None or not all(_generates(part) for part in parts):
            return None
        sequences = [part.sequence for part in parts]
        tokens = [
            Token(s.tokens[part.first], part.first, s.point, s.table) for s, part in zip(sequences, parts, strict=True)
        ]
        found = self.graphs.run(tokens)
        if found is None:
            return None
        return *found, ((), tuple(BlockRow(n, n, token.pos, 1) for n, token in enumerate(tokens)))

    def _rows(self, parts: Items[Part]) -> tuple[list[int], list[tuple[Part, int]], list[tuple[Part, int]]]:
        """Token rows whose logits are needed; then (part, its row among them) to sample, and to score prompts with."""
        rows: list[int] = []
        sampling: list[tuple[Part, int]] = []
        scoring: list[tuple[Part, int]] = []
        token = 0
        for part in parts:
            if part.sequence.lacks_prompt_logprobs:
                scoring.append((part, len(rows)))
                rows.extend(range(token, token + part.new))
            elif part.samples:
                rows.append(token + part.new - 1)
            if part.samples and part.sequence.request.params.max_tokens > 0:
                sampling.append((part, len(rows) - 1))
            token += part.new
        return rows or [token - 1], sampling, scoring

    def _score(self, part: Part, logits: Tensor) -> bool:
        """Log-probabilities of the prompt tokens that follow the part's positions, into the sequence. False when they
        are not finite."""
        sequence, top = part.sequence, part.sequence.request.prompt_logprobs
        assert top is not None
        known: list[TokenLogprob | None] = sequence.prompt_logprobs or [None]
        skip = len(known) - 1 - part.first  # positions scored before a preemption
        stop = min(part.first + part.new, sequence.prompt_length - 1)
        wanted = sequence.tokens[part.first + skip + 1 : stop + 1]
        try:
            known.extend(self.sampler.prompt_logprobs(logits[skip : skip + len(wanted)], wanted, top))
        except ValueError:
            return False
        sequence.prompt_logprobs = known
        return True


def _generates(part: Part) -> bool:
    """Whether it is the newest token of a sequence, behind its prompt."""
    return part.new == 1 and part.samples and part.first >= part.sequence.prompt_length


def _to_device(numbers: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """int64, without waiting for the device."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _positions(spans: Items[Span]) -> list[int]:
    return [position for span in spans for position in range(span.first, span.first + span.new)]
