"""From answers to numbers: shares with Wilson's intervals, paired differences to the baseline, densities."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gossamer.server.eval.question import Answer, Likelihood, Passage, Question, Use, found, score

Z = 1.959964  # of 95 %
RUN = 64  # tokens of a text whose mean counts as one value: neighbours are not independent
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A question at a point, answered and scored."""

    point: str
    question: Question
    answer: Answer

    @property
    def score(self) -> float:
        return score(self.answer.text, self.question)

    @property
    def found(self) -> int:
        return found(self.answer.text, self.question.references)


@dataclass(frozen=True, slots=True)
class Predicted:
    """A text at a point."""

    point: str
    passage: Passage
    likelihood: Likelihood

    def runs(self) -> list[float]:
        """Mean negative log-likelihood, in nats, of each run of RUN tokens."""
        values = self.likelihood.logprobs
        return [-sum(part) / len(part) for part in (values[at : at + RUN] for at in range(0, len(values), RUN))]


@dataclass(frozen=True, slots=True)
class Densities:
    """Shares of the causal keys that were read, over all requests, by the pairs that each computed."""

    prefill: float | None
    decode: float | None

    @classmethod
    def of(cls, uses: Sequence[Use]) -> "Densities":
        prompts = [(use.prefill_density, use.prefill_pairs) for use in uses]
        return cls(_weighted(prompts), _weighted([(use.decode_density, use.decode_pairs) for use in uses]))


@dataclass(frozen=True, slots=True)
class Cell:
    """One task at one length and point. value: mean score, or nats per token of a text. units: questions, or runs of a
    text's tokens. difference: to the baseline on the same questions, with its interval; None for the baseline itself,
    or where there is none. found of references: strings, as counted; whole: replies with a full score."""

    task: str
    length: int
    point: str
    units: int
    value: float
    interval: Interval
    difference: float | None
    difference_interval: Interval | None
    densities: Densities
    found: int = 0
    references: int = 0
    whole: int = 0
    text: bool = False  # a text that was read: nats, of which fewer are better

    @property
    def perplexity(self) -> float:
        return math.exp(self.value)


def wilson(mean: float, count: int) -> Interval:
    """The 95 % interval of a share from `count` trials (Wilson 1927). Scores between 0 and 1 vary less than the trials
    of 0 or 1 with their mean, so for them it is too wide rather than too narrow."""
    middle = mean + Z * Z / (2 * count)
    spread = Z * math.sqrt(max(0.0, mean * (1 - mean)) / count + Z * Z / (4 * count * count))
    whole = 1 + Z * Z / count
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def paired(base: Sequence[float], own: Sequence[float]) -> tuple[float, Interval]:
    """own - base of scores of the same questions, and the 95 % interval of Newcombe (1998, method 10), which joins both
    Wilson intervals by how much the scores go together."""
    count = len(base)
    p, q = sum(own) / count, sum(base) / count
    (low_p, high_p), (low_q, high_q) = wilson(p, count), wilson(q, count)
    phi = _together(own, base)
    down = (p - low_p) ** 2 - 2 * phi * (p - low_p) * (high_q - q) + (high_q - q) ** 2
    up = (high_p - p) ** 2 - 2 * phi * (high_p - p) * (q - low_q) + (q - low_q) ** 2
    return p - q, (max(-1.0, p - q - math.sqrt(max(0.0, down))), min(1.0, p - q + math.sqrt(max(0.0, up))))


def _together(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation, lowered by Newcombe's correction for few pairs; 0 where one does not vary."""
    count = len(a)
    mean_a, mean_b = sum(a) / count, sum(b) / count
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)) / count
    if spread == 0:
        return 0.0
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / count
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * count))
    return covariance / spread


def mean_interval(values: Sequence[float]) -> Interval:
    """The 95 % interval of a mean, from the spread of its values; the mean itself where there is one value."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, mean
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean - Z * error, mean + Z * error


def cells(outcomes: Iterable[Outcome], texts: Iterable[Predicted], baseline: str | None) -> list[Cell]:
    """In the order in which tasks, lengths and points first came."""
    asked: dict[tuple[str, int, str], list[Outcome]] = {}
    for outcome in outcomes:
        asked.setdefault((outcome.question.task, outcome.question.length, outcome.point), []).append(outcome)
    made = []
    for (task, length, point), own in asked.items():
        scores = [each.score for each in own]
        against = None if baseline is None or point == baseline else asked.get((task, length, baseline))
        difference = None if against is None else paired([each.score for each in against], scores)
        made.append(
            Cell(
                task,
                length,
                point,
                units=len(own),
                value=sum(scores) / len(scores),
                interval=wilson(sum(scores) / len(scores), len(scores)),
                difference=difference and difference[0],
                difference_interval=difference and difference[1],
                densities=Densities.of([each.answer.use for each in own]),
                found=sum(each.found for each in own),
                references=sum(len(each.question.references) for each in own),
                whole=sum(value == 1 for value in scores),
            )
        )
    return made + _text_cells(texts, baseline)


def _text_cells(texts: Iterable[Predicted], baseline: str | None) -> list[Cell]:
    told: dict[tuple[str, int, str], list[Predicted]] = {}
    for text in texts:
        told.setdefault((text.passage.task, text.passage.length, text.point), []).append(text)
    made = []
    for (task, length, point), own in told.items():
        runs = [run for each in own for run in each.runs()]
        against = None if baseline is None or point == baseline else told.get((task, length, baseline))
        lost = None
        if against is not None:
            before = [run for each in against for run in each.runs()]
            lost = [mine - other for mine, other in zip(runs, before, strict=True)]
        made.append(
            Cell(
                task,
                length,
                point,
                units=len(runs),
                value=sum(runs) / len(runs),
                interval=mean_interval(runs),
                difference=None if lost is None else sum(lost) / len(lost),
                difference_interval=None if lost is None else mean_interval(lost),
                densities=Densities.of([each.likelihood.use for each in own]),
                text=True,
            )
        )
    return made


def _weighted(pairs: Sequence[tuple[float | None, float]]) -> float | None:
    known = [(value, weight) for value, weight in pairs if value is not None and weight > 0]
    whole = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / whole if whole else None
