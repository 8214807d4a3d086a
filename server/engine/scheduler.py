"""Which sequences compute which tokens in the next step. No torch here, and no clock.

There is no prefill phase and no decode phase: every running sequence has some tokens to compute. Sequences with one
token left take it, then the rest of the step's budget goes to prompts in chunks: half of it to the first in rank, so
that it always moves on, the other half to those with the least left, so that short prompts overtake long ones.

A sequence that finds no page takes them from the last in rank, which is recomputed later; it never takes from one
before it. The first in rank can therefore always finish.

A step may be planned while the one before it is under way: a sequence whose next token that one chooses is planned to
feed it, by its length alone (`Sequence.unread`). What was launched counts as computed: whatever reads or overwrites its
pages is launched behind it, on the same stream.
"""

from bisect import insort
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from gossamer.kvcache.cache import KVCache
from gossamer.server.engine.pace import Pace
from gossamer.server.engine.sequence import Sequence

PROMPT_LOGPROB_TOKENS = 256  # chunk of a prompt whose every position needs its logits


class Part(NamedTuple):
    """One sequence's share of a step."""

    sequence: Sequence
    first: int
    new: int
    samples: bool  # whether the next token follows from it

    @property
    def chooses(self) -> bool:
        """Whether that token is wanted: a request may ask for none."""
        return self.samples and self.sequence.request.params.max_tokens > 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and the running set may hold."""

    sequences: int
    step_tokens: int
    step_seconds: float  # predicted time of a step while other sequences wait for it


@dataclass(slots=True)
class Scheduler:
    """Waiting and running sequences, both in order of rank. Touched by the engine thread alone."""

    cache: KVCache
    limits: Limits
    pace: Pace
    prefix_caching: bool
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    queried_tokens: int = 0  # prompt tokens looked up in the prefix cache, once per choice
    hit_tokens: int = 0
    _blocked: tuple[object, ...] | None = None  # the state in which the head of the queue last found no room

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)
        self._blocked = None

    def remove(self, sequence: Sequence) -> None:
        """Finished, failed or cancelled, at any stage: its pages are free when this returns."""
        self.cache.drop(sequence.table)
        (self.running if sequence.running else self.waiting).remove(sequence)
        sequence.running = False
        sequence.ended = True
        self._blocked = None

    def plan(self) -> list[Part]:
        """Admit who fits, then hand out the next step's tokens and pages. Empty when there is nothing to do."""
        self._admit()
        parts: dict[Sequence, Part] = {}
        budget = self.limits.step_tokens
        for sequence in list(self.running):
            if sequence.running and sequence.pending == 1 and budget > 0:
                budget -= self._take(sequence, 1, parts)
        for sequence, chunk in self._chunks(budget, parts):
            if sequence.running:
                self._take(sequence, chunk, parts)
        return list(parts.values())

    def launched(self, parts: Items[Part]) -> None:
        """The step is under way: enter full pages of known tokens into the prefix index, release what the rules no
        longer keep, and count the tokens that are being chosen."""
        for part in parts:
            sequence = part.sequence
            self.cache.seal(sequence.table, sequence.tokens, min(sequence.computed, len(sequence.tokens)))
            self.cache.trim(sequence.table)
            sequence.unread += part.chooses

    def arrived(self, parts: Items[Part]) -> None:
        """The step's results are on the host, and its sequences are about to be told. Pages that it filled with a token
        that was not known then can be found from now on."""
        for part in parts:
            sequence = part.sequence
            sequence.unread -= part.chooses
            sequence.settled = part.first + part.new
            if sequence.running:  # and has its pages still
                self.cache.seal(sequence.table, sequence.tokens, part.first + part.new)

    def _take(self, sequence: Sequence, tokens: int, parts: dict[Sequence, Part]) -> int:
        """Give `sequence` pages for `tokens` more tokens, from sequences behind it if need be: how many it got."""
        while not self.cache.can_grow(sequence.table, tokens):
            last = self.running[-1]
            if last is sequence:
                return 0  # nobody behind it; those before it will finish and give pages back
            parts.pop(last, None)
            self._preempt(last)
        first = sequence.computed
        self.cache.grow(sequence.table, tokens)
        parts[sequence] = Part(sequence, first, tokens, first + tokens == sequence.chosen)
        return tokens

    def _preempt(self, sequence: Sequence) -> None:
        self.cache.drop(sequence.table)
        sequence.running = False
        sequence.preemptions += 1
        self.preemptions += 1
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=_rank)

    def _chunks(self, budget: int, parts: dict[Sequence, Part]) -> list[tuple[Sequence, int]]:
        """Split the budget among the sequences with more than one token to compute."""
        prompts = [s for s in self.running if s.pending > 1]
        if not prompts or budget <= 0:
            return []
        units = self._units(len(self.running) + len(self.waiting) > 1, parts)
        share: dict[Sequence, int] = {}
        oldest, *others = prompts
        half = budget if not others else (budget + 1) // 2
        size = self.cache.page_size
        least = min(oldest.pending, size - oldest.computed % size, budget)  # it must move on, by a page where that fits
        for sequence in (oldest, *sorted(others, key=lambda s: (s.pending, s.rank)), oldest):
            had = share.get(sequence, 0)
            most = half if sequence is oldest and not share else budget
            within = self.pace.most_tokens(sequence.computed + had, units) if units is not None else most
            got = min(sequence.pending - had, most, within)
            if not share:
                got = max(got, least)
            share[sequence] = had + got
            budget -= got
            if units is not None:
                units = max(0.0, units - self.pace.work(sequence.computed + had, got))
        chunks = [(s, self._whole_pages(s, tokens, s is oldest)) for s, tokens in share.items()]
        return [(s, tokens) for s, tokens in chunks if tokens > 0]

    def _units(self, others_wait: bool, parts: dict[Sequence, Part]) -> float | None:
        """Work that prompts may add to this step, or None when nobody would wait for it or nothing is known yet."""
        pace = self.pace.seconds_per_unit
        if not others_wait or not pace:
            return None
        return max(0.0, self.limits.step_seconds / pace - sum(self.pace.work(p.first, p.new) for p in parts.values()))

    def _whole_pages(self, sequence: Sequence, tokens: int, must_move: bool) -> int:
        """End chunks at page boundaries, unless the prompt ends first, or the sequence that must move on would not."""
        size = self.cache.page_size
        if sequence.lacks_prompt_logprobs:
            tokens = min(tokens, PROMPT_LOGPROB_TOKENS)
        if tokens >= sequence.pending:
            return sequence.pending
        end = (sequence.computed + tokens) // size * size
        if end > sequence.computed:
            return end - sequence.computed
        return tokens if must_move else 0

    def _admit(self) -> None:
        """Move waiting sequences to the running set, in order of rank, while there is room for their known tokens."""
        state = (self.cache.available(), len(self.running))
        if self._blocked == state:
            return
        for sequence in list(self.waiting):
            if len(self.running) >= self.limits.sequences:
                break
            if self._waits_for_leader(sequence):
                continue
            if not self._fits(sequence):
                self._blocked = (self.cache.available(), len(self.running))
                break
            self.waiting.remove(sequence)
            sequence.running = True
            insort(self.running, sequence, key=_rank)

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether another choice of the same request is still computing prompt pages that this one could reuse."""
        leader = sequence.leader
        if leader is None or leader.ended:
            return False
        if leader.lacks_prompt_logprobs:
            return True  # they are published with the request's first token
        if not self.prefix_caching:
            return False
        reusable = (leader.prompt_length - 1) // self.cache.page_size * self.cache.page_size
        return leader.computed < reusable

    def _fits(self, sequence: Sequence) -> bool:
        """Attach what the prefix cache has; whether the rest fits beside what the running sequences still need."""
        hit = 0
        if not sequence.lacks_prompt_logprobs:  # cached pages would leave their positions without logits
            hit = self.cache.attach(sequence.table, sequence.tokens, len(sequence.tokens) - 1)
        wanted = [sum(pages) for pages in zip(*map(self._outstanding, (sequence, *self.running)), strict=True)]
        if self.running and any(need > have for need, have in zip(wanted, self.cache.available(), strict=True)):
            self.cache.drop(sequence.table)
            return False
        if sequence.preemptions == 0:
            sequence.cached = hit
            self.queried_tokens += len(sequence.tokens)
            self.hit_tokens += hit
        return True

    def _outstanding(self, sequence: Sequence) -> tuple[int, ...]:
        """Per group, the pages that the sequence's known tokens, and the next one, will still need."""
        table, known = sequence.table, sequence.chosen
        need = self.cache.pages_needed(table.rules, known + 1, min(self.limits.step_tokens, known))
        return tuple(max(0, pages - held) for pages, held in zip(need, table.held, strict=True))


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank
