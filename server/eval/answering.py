"""Who answers: the engine in this process, or a server at a URL."""

from collections.abc import Sequence
from typing import Protocol

from gossamer.server.eval.question import Answer, Likelihood, Passage, Question


class Answering(Protocol):
    """Raises EvalError where an answer cannot be had."""

    @property
    def points(self) -> tuple[str, ...]:
        """Operating points to compare; the first is the baseline."""
        ...

    @property
    def baseline(self) -> str | None:
        """The point that is dense attention; None where a server has none, or does not say."""
        ...

    def ask(self, point: str, questions: Sequence[Question]) -> list[Answer]:
        """Greedy replies to the questions of one document: the first alone, so that the others find what they share
        with it, and these at once."""
        ...

    def read(self, point: str, passage: Passage) -> Likelihood: ...

    def fingerprints(self) -> dict[str, str]:
        """By point, what changes with anything that changes its answers, as `system_fingerprint` says it; of a server,
        of the points that were asked so far."""
        ...
