"""How near an operating point comes to dense: divergence of next-token distributions, and answers to questions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.attention.policy import AttentionPolicy, OperatingPoint
from gossamer.attention.profiling.prompts import Document, Exchange
from gossamer.attention.profiling.reading import Reader, Shape
from gossamer.attention.reads import SpanReads

NOTHING = SpanReads(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Score:
    """One exchange under an operating point: `divergence` from dense in nats (Kullback-Leibler, mean over the answer's
    tokens), `agreement`, the share of them where both would say the same token next, and how many of the strings that
    a right answer holds are found when each token before is given."""

    task: str
    length: int
    divergence: float
    agreement: float
    found: int
    references: int


@dataclass(frozen=True, slots=True)
class Trial:
    """All exchanges under one operating point, and what was read of what could be, by length."""

    scores: tuple[Score, ...]
    reads: dict[int, SpanReads]

    def cells(self) -> dict[tuple[str, int], "Cell"]:
        """By task and length."""
        found: dict[tuple[str, int], list[Score]] = {}
        for score in self.scores:
            found.setdefault((score.task, score.length), []).append(score)
        return {key: Cell.of(own) for key, own in found.items()}

    def divergence(self) -> float:
        """The largest mean of any length, plain text and answers weighing the same."""
        by_length: dict[int, dict[bool, list[float]]] = {}
        for score in self.scores:
            by_length.setdefault(score.length, {}).setdefault(score.references > 0, []).append(score.divergence)
        return max(sum(sum(own) / len(own) for own in kinds.values()) / len(kinds) for kinds in by_length.values())


@dataclass(frozen=True, slots=True)
class Cell:
    """One task at one length."""

    exchanges: int
    divergence: float
    agreement: float
    accuracy: float | None  # None where nothing was asked
    references: int

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Cell":
        count, references = len(scores), sum(score.references for score in scores)
        return cls(
            count,
            sum(score.divergence for score in scores) / count,
            sum(score.agreement for score in scores) / count,
            sum(score.found for score in scores) / references if references else None,
            references,
        )


@dataclass(frozen=True, slots=True)
class _Told:
    """What was said about a document: log-probabilities [rows, V] of each exchange, and what was read for them."""

    logs: tuple[Tensor, ...]
    reads: SpanReads


class Fidelity:
    """Compares operating points with dense attention, which is run once for each document."""

    def __init__(self, module: nn.Module, shape: Shape, dense: AttentionPolicy, chunk: int) -> None:
        self._module, self._shape, self._dense, self._chunk = module, shape, dense, chunk
        self._known: dict[str, _Told] = {}  # under dense attention, by document

    def try_point(self, policy: AttentionPolicy, documents: Iterable[Document], tick: Callable[[], None]) -> Trial:
        """policy: its first operating point. tick: after each document."""
        is_dense = policy.points[0].fingerprint() == self._dense.points[0].fingerprint()
        scores: list[Score] = []
        reads: dict[int, SpanReads] = {}
        for document in documents:
            dense = self._told_densely(document)
            own = dense if is_dense else self._told(policy, document)
            for exchange, right, told in zip(document.exchanges, dense.logs, own.logs, strict=True):
                scores.append(_score(document, exchange, right, told))
            reads[document.length] = reads.get(document.length, NOTHING).plus(own.reads)
            tick()
        return Trial(tuple(scores), reads)

    def try_decodes(
        self, policies: Sequence[AttentionPolicy], documents: Iterable[Document], tick: Callable[[], None]
    ) -> list[Trial]:
        """The first operating points of policies that differ for generated tokens alone and keep everything: prompts
        are read once for all of them. What was read is not counted."""
        scores: list[list[Score]] = [[] for _ in policies]
        points = [policy.points[0] for policy in policies]
        named = [OperatingPoint(f"{number}", point.heads) for number, point in enumerate(points)]
        summaries = AttentionPolicy("all", tuple(named)).summaries()
        for document in documents:
            dense = self._told_densely(document)
            reader = Reader(
                self._module,
                policies[0],
                room=document.room,
                chunk=self._chunk,
                shape=self._shape,
                summaries=summaries,
            )
            for exchange, right in zip(document.exchanges, dense.logs, strict=True):
                for point, own in zip(points, scores, strict=True):
                    rows = list(exchange.rows)
                    reading = reader.read(exchange.tokens, prompt=exchange.prompt, rows=rows, point=point)
                    own.append(_score(document, exchange, right, reading.logits.log_softmax(-1)))
            tick()
        return [Trial(tuple(own), {}) for own in scores]

    def _told_densely(self, document: Document) -> _Told:
        if document.name not in self._known:
            self._known[document.name] = self._told(self._dense, document)
        return self._known[document.name]

    def _told(self, policy: AttentionPolicy, document: Document) -> _Told:
        reader = Reader(self._module, policy, room=document.room, chunk=self._chunk, shape=self._shape)
        logs: list[Tensor] = []
        reads = NOTHING
        for exchange in document.exchanges:
            reading = reader.read(exchange.tokens, prompt=exchange.prompt, rows=list(exchange.rows))
            logs.append(reading.logits.log_softmax(-1))
            reads = reads.plus(reading.reads)
        return _Told(tuple(logs), reads)


def _score(document: Document, exchange: Exchange, dense: Tensor, told: Tensor) -> Score:
    divergence = (dense.exp() * (dense - told)).sum(-1).clamp(min=0).mean()
    said = told.argmax(-1)
    wanted = torch.tensor(exchange.tokens[exchange.prompt :])
    right = said == wanted
    first = exchange.prompt
    return Score(
        document.task,
        document.length,
        float(divergence),
        float((said == dense.argmax(-1)).float().mean()),
        sum(bool(right[a - first : b - first].all()) for a, b in exchange.references),
        len(exchange.references),
    )


def together(trials: Sequence[Trial]) -> Trial:
    """Of one operating point, on different documents."""
    reads: dict[int, SpanReads] = {}
    for trial in trials:
        for length, own in trial.reads.items():
            reads[length] = reads.get(length, NOTHING).plus(own)
    return Trial(tuple(score for trial in trials for score in trial.scores), reads)


def least_divergence(trials: Sequence[Trial], documents: Sequence[Document]) -> float:
    """What the divergence over documents of one length will be at least, from trials on some of them: what is missing
    may agree with dense wholly."""
    sums, counts = {False: 0.0, True: 0.0}, {False: 0, True: 0}
    for score in (score for trial in trials for score in trial.scores):
        sums[score.references > 0] += score.divergence
    for exchange in (exchange for document in documents for exchange in document.exchanges):
        counts[len(exchange.references) > 0] += 1
    kinds = [kind for kind, count in counts.items() if count]
    return sum(sums[kind] / counts[kind] for kind in kinds) / len(kinds)


def losses(dense: Trial, trial: Trial) -> dict[tuple[str, int], float]:
    """By task and length, accuracy lost against dense, in points (hundredths)."""
    before, after = dense.cells(), trial.cells()
    found = {}
    for key, cell in after.items():
        known = before[key].accuracy
        if cell.accuracy is not None and known is not None:
            found[key] = 100 * (known - cell.accuracy)
    return found


def within(dense: Trial, trial: Trial, points: float) -> bool:
    """Whether neither a task, at any length, nor all tasks of a length together lose more than so many points. A single
    answer is let pass: fewer answers than 100 / points cannot tell less, and one may turn by chance."""
    before, after = dense.cells(), trial.cells()
    lost: dict[tuple[str, int], tuple[int, int]] = {}
    for (task, length), cell in after.items():
        known = before[task, length]
        if cell.accuracy is None or known.accuracy is None:
            continue
        answers = round(known.accuracy * known.references) - round(cell.accuracy * cell.references)
        lost[task, length] = answers, cell.references
        less, of = lost.get(("", length), (0, 0))
        lost["", length] = less + answers, of + cell.references
    return all(answers <= max(1.0, points / 100 * of) for answers, of in lost.values())
