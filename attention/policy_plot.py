"""The heat map of an operating point as a picture. Needs matplotlib, which is an extra (`gossamer[plots]`)."""

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from gossamer.attention.policy_view import Cell, Panel, PointView

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL, LINE, MARGIN = 0.24, 0.18, 0.55  # inches
NARROWEST = 9.0  # inches; a line of the legend fits
LETTERS = 13  # per inch, in the small type


def draw_point(view: PointView, path: Path) -> None:
    """Write a PNG. Raises ImportError without matplotlib, OSError for a path that cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers, heads = len(view.panels[0].cells), len(view.panels[0].cells[0])
    legend = view.legend()
    tall, wide = max(layers, 4) * CELL, max(heads, 4) * CELL
    width = max(len(view.panels) * (wide + 2 * MARGIN), NARROWEST)
    title = [part for line in view.title for part in wrap(line, int(width * LETTERS))]
    notes = ["~ streams: gives the memory of the tokens in between back;  ? unknown until measured", *view.means()]
    below = (len(notes) + len(legend) + 2) * LINE + MARGIN
    height = tall + below + len(title) * LINE + MARGIN
    figure = Figure(figsize=(width, height), dpi=120)
    for number, panel in enumerate(view.panels):
        middle = (number + 0.5) * width / len(view.panels)
        box = (middle - wide / 2) / width, below / height, wide / width, tall / height
        _draw_panel(figure.add_axes(box), panel)
    for number, line in enumerate(title):
        weight = "bold" if number == 0 else "normal"
        figure.text(0.02, 1 - (number + 1.5) * LINE / height, line, weight=weight, size=8, parse_math=False)
    for number, line in enumerate(reversed(notes)):
        figure.text(0.02, (number + 0.7) * LINE / height, line, size=8)
    patches = [
        Patch(facecolor=_unit(cell), edgecolor="black", linewidth=0.5, label=f"{cell.text()}  {cell.signs}")
        for cell, _ in legend
    ]
    corner = 0.01, (len(notes) + 0.7) * LINE / height
    figure.legend(handles=patches, loc="lower left", bbox_to_anchor=corner, frameon=False, fontsize=8)
    figure.savefig(path, format="png")


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    axes.imshow([[_unit(cell) for cell in layer] for layer in panel.cells], aspect="auto", interpolation="nearest")
    for layer, row in enumerate(panel.cells):
        for head, cell in enumerate(row):
            if cell.signs:
                axes.text(head, layer, cell.signs, color=cell.ink, ha="center", va="center", size=7)
    axes.set_title(panel.phase, size=9)
    axes.set_xlabel("KV head", size=8)
    axes.set_ylabel("layer", size=8)
    axes.tick_params(labelsize=7)
    axes.set_xticks(range(0, len(panel.cells[0]), 1 if len(panel.cells[0]) <= 10 else 5))
    axes.set_yticks(range(0, len(panel.cells), 1 if len(panel.cells) <= 10 else 5))


def _unit(cell: Cell) -> tuple[float, float, float]:
    red, green, blue = cell.tint
    return red / 255, green / 255, blue / 255
