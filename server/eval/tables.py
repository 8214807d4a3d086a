"""The numbers for people: a table per length, tasks down, operating points across."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from gossamer.server.eval.results import Cell, Interval
from gossamer.server.eval.run import Found

ACROSS = 3  # points of a table, beside the first


def print_results(found: Found, console: Console) -> None:
    """Where there are many points, several tables, each with the first point."""
    made = found.cells()
    first, *others = found.points
    for length in sorted({cell.length for cell in made}):
        for at in range(0, max(1, len(others)), ACROSS):
            points = (first, *others[at : at + ACROSS])
            own = [cell for cell in made if cell.length == length and cell.point in points]
            console.print(_table(length, own, points, found.baseline))
    console.print(
        "Scores in per cent; behind them the difference to dense on the same questions, or dense's own range, with "
        "95 % intervals. Texts: perplexity, and nats per token more than dense.",
        markup=False,
    )
    for note in found.notes:
        console.print(note, markup=False)


def _table(length: int, made: Sequence[Cell], points: Sequence[str], baseline: str | None) -> Table:
    names = [f"{point} (dense)" if point == baseline != "dense" else point for point in points]
    table = Table(f"{length:,} tokens", *names)
    for task in dict.fromkeys(cell.task for cell in made):
        own = {cell.point: cell for cell in made if cell.task == task}
        table.add_row(f"{task} ({own[points[0]].units})", *(shown(own[point]) for point in points))
    asked = [cell for cell in made if not cell.text]
    table.add_section()
    if len({cell.task for cell in asked}) > 1:
        table.add_row("mean of tasks", *(_mean(asked, point, baseline) for point in points))
        table.add_row("worst task", *(_worst(asked, point) for point in points))
    for phase in ("prefill", "decode"):
        values = [[getattr(cell.densities, phase) for cell in made if cell.point == point] for point in points]
        table.add_row(f"read in {phase}", *(_share(own) for own in values))
    return table


def shown(cell: Cell) -> str:
    """A value with its interval, or its difference."""
    if cell.text:
        more = "" if cell.difference is None else f"  {cell.difference:+.4f} {_range(cell.difference_interval, 1, 4)}"
        return f"{cell.perplexity:.3f}{more}"
    if cell.difference is None:
        return f"{100 * cell.value:.1f} {_range(cell.interval, 100, 0)}"
    return f"{100 * cell.value:.1f}  {100 * cell.difference:+.1f} {_range(cell.difference_interval, 100, 0)}"


def _range(interval: Interval | None, factor: float, digits: int) -> str:
    assert interval is not None
    low, high = (factor * end for end in interval)
    return f"({low:.{digits}f} to {high:.{digits}f})"


def _mean(asked: Iterable[Cell], point: str, baseline: str | None) -> str:
    """RULER's number: every task weighs the same."""
    own = [cell.value for cell in asked if cell.point == point]
    text = f"{100 * sum(own) / len(own):.1f}"
    differences = [cell.difference for cell in asked if cell.point == point and cell.difference is not None]
    if point == baseline or not differences:
        return text
    return f"{text}  {100 * sum(differences) / len(differences):+.1f}"


def _worst(asked: Iterable[Cell], point: str) -> str:
    own = [cell for cell in asked if cell.point == point]
    compared = [(cell.difference, cell.task) for cell in own if cell.difference is not None]
    if compared:
        difference, task = min(compared)
        return f"{100 * difference:+.1f} {task}"
    worst = min(own, key=lambda cell: cell.value)
    return f"{100 * worst.value:.1f} {worst.task}"


def _share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * sum(known) / len(known):.1f} %" if known else "not said"
