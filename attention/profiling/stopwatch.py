"""What profiling takes: seconds and memory of each stage."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from gossamer.attention.profiling.profile import Spent


@dataclass(slots=True)
class Stopwatch:
    """Adds up by stage, in the order in which they began."""

    _seconds: dict[str, float] = field(default_factory=dict)
    _memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began
            self._memory[name] = _most_memory()

    @property
    def spent(self) -> tuple[Spent, ...]:
        return tuple(Spent(name, seconds, self._memory[name]) for name, seconds in self._seconds.items())


def _most_memory() -> int:
    """Bytes that the GPU has held at most, or the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
