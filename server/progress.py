"""How far a long command has come: bars on a terminal, lines elsewhere."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

PATIENCE = 60.0  # seconds between lines about one stage


@dataclass(slots=True)
class _Stage:
    name: str
    total: int
    said: float  # when
    done: int = 0


class Shown:
    """Progress with the time. To be ended."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._began = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bars.start()
        self._task: TaskID | None = None
        self._stage: _Stage | None = None

    def begin(self, stage: str, total: int) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(stage, total=total)
        self._stage = _Stage(stage, total, time.monotonic())

    def tick(self) -> None:
        if self._task is None or self._stage is None:
            return
        self._bars.advance(self._task)
        stage, now = self._stage, time.monotonic()
        stage.done += 1
        if not self._bars.console.is_terminal and now - stage.said >= PATIENCE:
            stage.said = now
            self.say(f"{stage.name}: {stage.done} of {stage.total}")

    def say(self, text: str) -> None:
        self._bars.console.print(f"{time.monotonic() - self._began:7.1f}s  {text}", markup=False)

    def end(self) -> None:
        self._bars.stop()
