"""Pictures of an evaluation. Need matplotlib, which is an extra (`gossamer[plots]`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.server.eval.results import Cell
from gossamer.server.eval.run import Found, needle_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 3.2  # inches
ACROSS = 4  # panels
GREY = "#4d4d4d"  # dense
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#7b3fa0", "#56b4e9", "#d55e00")
MARKS = (("o", "-"), ("s", "--"), ("^", ":"))  # and lines, for as many points as there are colours
MANY = 5  # points whose intervals can be told apart
LETTER = 0.075  # inches, of a legend


def draw(found: Found, folder: Path) -> list[Path]:
    """Write accuracy.png, perplexity.png, needle.png and density.png, as far as there is something to show. Raises
    OSError for a folder that cannot be written."""
    made = found.cells()
    asked, texts = [cell for cell in made if not cell.text], [cell for cell in made if cell.text]
    grid = needle_grid(found.outcomes)
    pictures: dict[str, Figure] = {}
    if asked:
        pictures["accuracy"] = _by_length(asked, found.points, "right answers, per cent", 100.0)
    if texts:
        pictures["perplexity"] = _by_length(texts, found.points, "nats per token", 1.0)
    if grid:
        pictures["needle"] = _needles(grid, found.points)
    if any(cell.densities.prefill is not None for cell in made):
        pictures["density"] = _density(made, found.points)
    written = []
    for name, figure in pictures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], format="png")
    return written


def _panels(count: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    columns = min(count, ACROSS)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(columns, 2) * PANEL, rows * PANEL * 0.85 + 0.7), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _by_length(made: Sequence[Cell], points: Sequence[str], what: str, factor: float) -> "Figure":
    """A panel for each task: a line for each point with its 95 % intervals, a little apart."""
    tasks = list(dict.fromkeys(cell.task for cell in made))
    lengths = sorted({cell.length for cell in made})
    figure, axes = _panels(len(tasks))
    for task, panel in zip(tasks, axes, strict=True):
        for number, point in enumerate(points):
            own = {cell.length: cell for cell in made if (cell.task, cell.point) == (task, point)}
            places = [lengths.index(length) + 0.06 * (number - (len(points) - 1) / 2) for length in own]
            values = [factor * cell.value for cell in own.values()]
            below = [factor * max(0.0, cell.value - cell.interval[0]) for cell in own.values()]
            above = [factor * max(0.0, cell.interval[1] - cell.value) for cell in own.values()]
            style = _style(number)
            bars: dict[str, Any] = {"capsize": 2} if len(points) <= MANY else {"elinewidth": 0.5}
            panel.errorbar(places, values, yerr=[below, above], label=point, **bars, **style)
        _length_axis(panel, lengths)
        panel.set_title(task, size=9, parse_math=False)
        panel.set_ylabel(what, size=8)
        if factor == 100:
            panel.set_ylim(-4, 104)
    _legend(figure, axes[0])
    return figure


def _needles(grid: Sequence[dict[str, Any]], points: Sequence[str]) -> "Figure":
    """A heat map for each point: depth down, length across."""
    lengths = sorted({cell["length"] for cell in grid})
    depths = sorted({cell["depth"] for cell in grid})
    figure, axes = _panels(len(points))
    image = None
    for point, panel in zip(points, axes, strict=True):
        own = {(cell["depth"], cell["length"]): 100 * cell["accuracy"] for cell in grid if cell["point"] == point}
        rows = [[own.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        image = panel.imshow(rows, aspect="auto", interpolation="nearest", vmin=0, vmax=100, cmap="cividis")
        for down, row in enumerate(rows):
            for across, value in enumerate(row):
                ink = "black" if value > 55 else "white"
                panel.text(across, down, f"{value:.0f}", ha="center", va="center", size=7, color=ink)
        _length_axis(panel, lengths)
        panel.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths], size=7)
        panel.set_ylabel("depth of the needle, per cent", size=8)
        panel.set_title(point, size=9, parse_math=False)
    assert image is not None
    figure.colorbar(image, ax=axes, label="found, per cent")
    return figure


def _density(made: Sequence[Cell], points: Sequence[str]) -> "Figure":
    """Means over tasks, by length: one panel for prompts, one for generated tokens."""
    lengths = sorted({cell.length for cell in made})
    figure, axes = _panels(2)
    for phase, panel in zip(("prefill", "decode"), axes, strict=True):
        for number, point in enumerate(points):
            places, values = [], []
            for place, length in enumerate(lengths):
                own = [getattr(c.densities, phase) for c in made if (c.length, c.point) == (length, point)]
                if known := [value for value in own if value is not None]:
                    places.append(place)
                    values.append(100 * sum(known) / len(known))
            panel.plot(places, values, label=point, **_style(number))
        _length_axis(panel, lengths)
        panel.set_ylim(0, 104)
        panel.set_title(phase, size=9)
        panel.set_ylabel("keys read, per cent", size=8)
    _legend(figure, axes[0])
    return figure


def _style(number: int) -> dict[str, Any]:
    """Of the operating point of this number; the first is dense."""
    turn, place = divmod(number - 1, len(COLOURS))
    marker, line = MARKS[turn % len(MARKS)] if number else MARKS[0]
    colour = COLOURS[place] if number else GREY
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 3}


def _length_axis(panel: "Axes", lengths: Sequence[int]) -> None:
    """Lengths at equal distances."""
    panel.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths], size=7)
    panel.set_xlim(-0.5, len(lengths) - 0.5)
    panel.set_xlabel("tokens", size=8)
    panel.tick_params(labelsize=7)


def _legend(figure: "Figure", panel: "Axes") -> None:
    """In as many columns as there is room for."""
    handles, labels = panel.get_legend_handles_labels()
    room = int(figure.get_figwidth() / (LETTER * (max(map(len, labels)) + 6)))
    columns = max(1, min(len(labels), room))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
