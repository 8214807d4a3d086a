"""Recorded decode steps."""

from kernel_checks import run_interpreted


def test_recorded_steps_under_the_interpreter() -> None:
    run_interpreted("graphs_interpreted.py")
