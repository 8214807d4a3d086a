"""What profiling takes: seconds and memory of each stage."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gossamer.attention.profiling.profile import Spent
from gossamer.attention.profiling.state import State

NAME, KIND = "spent", tuple[Spent, ...]  # in the state


class Stopwatch:
    """Adds up by stage, in the order in which they began, and goes on from where an earlier run with the same state
    came to."""

    def __init__(self, state: State) -> None:
        self._state = state
        known: tuple[Spent, ...] = state.value(NAME, KIND, tuple)
        self._spent = {each.stage: each for each in known}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            known = self._spent.get(name, Spent(name, 0.0, 0))
            seconds = known.seconds + time.monotonic() - began
            self._spent[name] = Spent(name, seconds, max(known.memory, _most_memory()))
            self._state.keep(NAME, KIND, self.spent)

    @property
    def spent(self) -> tuple[Spent, ...]:
        return tuple(self._spent.values())


def _most_memory() -> int:
    """Bytes that the GPU has held at most, or the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
