"""What long commands say of how far they have come."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from gossamer.server import progress
from gossamer.server.progress import Shown


def test_without_a_terminal_there_is_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    lines = io.StringIO()
    shown = Shown(Console(file=lines, width=200))
    shown.tick()  # of no stage
    shown.say("Loading [model]")
    shown.begin("Asking", 9)
    for _ in range(5):
        now[0] += 25.0
        shown.tick()
    shown.begin("Reading", 2)
    now[0] += 61.0
    shown.tick()
    shown.end()
    said = [" ".join(line.split()) for line in lines.getvalue().splitlines()]
    assert said == ["0.0s Loading [model]", "75.0s Asking: 3 of 9", "186.0s Reading: 1 of 2"]


def test_on_a_terminal_there_are_bars_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    screen = io.StringIO()
    shown = Shown(Console(file=screen, width=80, force_terminal=True))
    shown.begin("Asking", 2)
    now[0] += 100.0
    shown.tick()
    shown.end()
    assert "Asking" in screen.getvalue()
    assert "Asking: 1 of 2" not in screen.getvalue()
