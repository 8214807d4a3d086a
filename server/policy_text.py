"""The heat map of an operating point in a terminal, and in plain text where the output is none."""

from itertools import zip_longest

from rich.console import Console
from rich.text import Text

from gossamer.attention.policy_view import Cell, Panel, PointView

GAP = 4  # between panels


def print_point(view: PointView, console: Console) -> None:
    """Colours where the console has them; letters and per cents otherwise."""
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    lines = [Text(line, "bold" if coloured and number == 0 else "") for number, line in enumerate(view.title)]
    panels = [_panel(panel, coloured) for panel in view.panels]
    width = sum(panel[0].cell_len for panel in panels) + GAP * (len(panels) - 1)
    if width <= console.width:
        lines += [Text(), *(Text(" " * GAP).join(row) for row in zip_longest(*panels))]
    else:
        lines += [line for panel in panels for line in (Text(), *panel)]
    lines += [Text(), *_legend(view, coloured), Text(), *map(Text, view.means())]
    for line in lines:
        if not coloured:  # where a blank may be a cell
            line.rstrip()
        console.print(line, soft_wrap=True, highlight=False)


def _panel(panel: Panel, coloured: bool) -> list[Text]:
    """A line for the phase, one for the numbers of the KV heads, one per layer; all equally wide."""
    heads, cell_width = len(panel.cells[0]), 3 if coloured else 6
    margin = len(f"layer {len(panel.cells) - 1} ")
    every = 1 if heads <= 10 else 5  # more numbers than that run together
    numbers = "".join(f"{head if head % every == 0 else '':^{cell_width}}" for head in range(heads))
    lines = [Text(panel.phase), Text(f"{'KV head':<{margin}}{numbers}")]
    for number, row in enumerate(panel.cells):
        line = Text(f"{f'layer {number}':<{margin}}")
        for cell in row:
            line.append_text(_coloured(cell) if coloured else Text(_letters(cell)))
        lines.append(line)
    widest = max(line.cell_len for line in lines)
    for line in lines:
        line.pad_right(widest - line.cell_len)
    return lines


def _coloured(cell: Cell) -> Text:
    """Three columns in the cell's tint, with its signs."""
    red, green, blue = cell.tint
    return Text.assemble((f"{cell.signs:^3}", f"{cell.ink} on rgb({red},{green},{blue})"))


def _letters(cell: Cell) -> str:
    """Six columns: the backend's letter, the per cents that it reads, "~" for a head that streams."""
    share = cell.nominal.share
    percent = "?" if share is None else "<1" if share < 0.01 else f"{100 * share:.0f}"
    return f"{cell.look.letter}{percent:>3}{'~' if cell.streams else ' '} "


def _legend(view: PointView, coloured: bool) -> list[Text]:
    """A line per kind of cell, then what the signs mean."""
    lines = []
    for cell, counts in view.legend():
        heads = ", ".join(f"{phase} {count}" for phase, count in counts.items())
        sample = _coloured(cell) if coloured else Text(f"{cell.look.letter}{'~' if cell.streams else ' '}")
        lines.append(Text.assemble(sample, f" {cell.text()} [heads: {heads}]"))
    signs = [] if coloured else ["per cent: nominal density"]
    cells = [cell for panel in view.panels for cell in panel]
    if any(cell.streams for cell in cells):
        signs.append("~ streams: gives the memory of the tokens between sink and window back")
    if any(cell.nominal.share is None for cell in cells):
        signs.append("? density is unknown until it is measured")
    if coloured:
        signs.append("the paler, the less is read")
    return [*lines, Text("; ".join(signs))]
