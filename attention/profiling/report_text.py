"""A report as Markdown: the same tables as the page, head maps in letters, and no pictures."""

from typing import TYPE_CHECKING

from gossamer.attention.policy_view import PointView, printable
from gossamer.attention.profiling.report_parts import HeadMap, Part, Table

if TYPE_CHECKING:
    from gossamer.attention.profiling.report import Report

SPECIAL = "\\`*_[]<>|#~&"


def as_markdown(report: "Report") -> str:
    """Every word that is not ours is escaped."""
    verdicts = [
        f"- **{plain(each.point.name)}** ({each.standing}): {plain(' '.join(each.said))}" for each in report.verdicts
    ]
    parts = [
        f"# {plain(report.title)}",
        plain(report.subtitle) + ".",
        f"**{plain(report.headline)}**",
        _table(report.overview),
        "\n".join(verdicts),
        "## What speaks against it",
        "\n".join(f"- {plain(doubt)}" for doubt in report.doubts),
    ]
    for section in report.sections:
        parts += [f"## {plain(section.title)}", *map(plain, section.said)]
        parts += [text for part in section.parts if (text := _part(part))]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """As text that means only itself, on one line."""
    return "".join(f"\\{letter}" if letter in SPECIAL else letter for letter in printable(text))


def _part(part: Part) -> str:
    if isinstance(part, Table):
        caption = f"{plain(part.caption)}\n\n" if part.caption else ""
        return caption + _table(part)
    return _head_map(part) if isinstance(part, HeadMap) else ""


def _table(table: Table) -> str:
    rows = [
        [
            f"**{plain(cell)}**" if (number, column) in table.marked and cell else plain(cell)
            for column, cell in enumerate(row)
        ]
        for number, row in enumerate(table.rows)
    ]
    rules = ["---" if column < table.words else "---:" for column in range(len(table.columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([plain(each) for each in table.columns], rules, *rows))


def _head_map(part: HeadMap) -> str:
    view = part.view
    phases = " and ".join(panel.phase for panel in view.panels)
    letters = "\n".join(["```", *_letters(view), "```"])
    return "\n\n".join([f"{plain(view.point)}, {phases}:", letters, "\n".join(_legend(view))])


def _letters(view: PointView) -> list[str]:
    """A line for each layer: the letters of both phases, with "~" and "?"."""
    lines = []
    for layer in range(len(view.panels[0].cells)):
        cells = [" ".join(f"{c.look.letter}{c.signs}".ljust(3) for c in panel.cells[layer]) for panel in view.panels]
        lines.append(f"layer {layer:<4}" + "   ".join(cells).rstrip())
    return lines


def _legend(view: PointView) -> list[str]:
    lines = []
    for cell, counts in view.legend():
        heads = ", ".join(f"{phase} {count}" for phase, count in counts.items())
        lines.append(f"- {plain(cell.look.letter + cell.signs)} {plain(cell.text())} ({heads} heads)")
    return lines
