"""What an evaluation asks, what it gets back, and how an answer is scored: as RULER does."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gossamer.attention.profiling.tasks import Message

FIRST_SEED = 10_000  # of documents; search uses seeds below, its verification those from 2000


class EvalError(Exception):
    """What was asked for cannot be evaluated. The message is one sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request. Questions of one `document` differ in their ends alone, so that a prefix cache holds the rest.

    length: tokens that prompt and reply have together, at most. tokens: of the prompt. most: tokens of the reply.
    any_counts: one reference is enough, as in RULER's QA; elsewhere the share of the references counts. depth: of a
    needle, 0 to 1."""

    task: str
    length: int
    document: str
    number: int
    chat: tuple[Message, ...]  # empty: `prompt` is sent as it is
    prompt: str
    references: tuple[str, ...]
    tokens: int
    most: int
    any_counts: bool = False
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """A text whose last `scored` tokens are predicted, each from all tokens before it."""

    task: str
    length: int
    document: str
    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True, slots=True)
class Use:
    """What one request computed: tokens of its prompt, those of them that a prefix cache held, tokens generated, and
    the share of the causal keys that was read, as `usage.attention` says it; None where nothing was, or nobody says."""

    prompt: int
    cached: int
    generated: int
    prefill_density: float | None = None
    decode_density: float | None = None

    @property
    def prefill_pairs(self) -> float:
        """Causal pairs of a query and a key, as far as computed."""
        return (self.prompt * (self.prompt + 1) - self.cached * (self.cached + 1)) / 2

    @property
    def decode_pairs(self) -> float:
        """The first token comes from the prompt's last query."""
        steps = max(0, self.generated - 1)
        return steps * self.prompt + steps * (steps + 1) / 2


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to a Question."""

    text: str
    use: Use


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of a Passage: natural log-probabilities of its scored tokens, in order."""

    logprobs: tuple[float, ...] = field(repr=False)
    use: Use


def found(reply: str, references: Sequence[str]) -> int:
    """How many of the references stand in the reply, without regard to case."""
    lowered = reply.lower()
    return sum(reference.lower() in lowered for reference in references)


def score(reply: str, question: Question) -> float:
    """0 to 1: the share of the references found, or whether any was."""
    count = found(reply, question.references)
    return float(count > 0) if question.any_counts else count / len(question.references)
