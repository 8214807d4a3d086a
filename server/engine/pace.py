"""How long a step will take, learned from the steps before it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class Pace:
    """Predicts step times as seconds per unit of work, a running mean.

    One unit of work is one token without context; a token that attends to `crossover` others costs two.
    """

    crossover: float
    seconds_per_unit: float | None = None

    def work(self, first: int, new: int) -> float:
        """Of computing positions first ... first + new - 1 of a sequence."""
        return new * (1.0 + (first + new / 2) / self.crossover)

    def most_tokens(self, first: int, units: float) -> int:
        """The longest chunk from position `first` whose work stays within `units` (solves work(first, n) = units)."""
        slope, base = 0.5 / self.crossover, 1.0 + first / self.crossover
        return max(0, int(((base * base + 4 * slope * units) ** 0.5 - base) / (2 * slope)))

    def predict(self, parts: Iterable[tuple[int, int]]) -> float:
        """Seconds for a step of (first, new) parts; 0 before anything was measured."""
        return (self.seconds_per_unit or 0.0) * sum(self.work(first, new) for first, new in parts)

    def learn(self, parts: Iterable[tuple[int, int]], seconds: float) -> None:
        """Account for a measured step."""
        work = sum(self.work(first, new) for first, new in parts)
        if work < 256:
            return  # small steps are overhead, not work
        measured = seconds / work
        old = self.seconds_per_unit
        self.seconds_per_unit = measured if old is None else old + 0.2 * (measured - old)
