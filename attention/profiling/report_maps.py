"""Maps of heads as inline SVG: a cell for each layer and KV head, with what it does or how much."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from gossamer.attention.policy_view import Cell, Panel
from gossamer.attention.profiling.report_charts import svg

LEFT, TOP = 30, 34
FEW_HEADS = 16  # wider maps have no numbers in their cells
TALL = 32  # layers; taller maps have lower cells
# pale for little, dark for much (ColorBrewer's YlGnBu, which the colour-blind can read)
RAMP = ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58")
LIGHT = 5  # of the ramp's colours, on which black is read more easily

Values = Sequence[Sequence[float | None]]  # [layer][KV head], None where a policy changes nothing


def head_map(panel: Panel) -> str:
    """Letters and tints of attention/policy_view.py; "~" for a head that streams, "?" for an unknown density."""
    layers, heads = len(panel.cells), len(panel.cells[0])
    wide, tall = (24 if heads <= FEW_HEADS else 18), _height(layers)
    parts = [_frame(panel.phase, layers, heads, wide, tall)]
    kinds: dict[Cell, list[tuple[int, int]]] = {}
    for layer, row in enumerate(panel.cells):
        for head, cell in enumerate(row):
            kinds.setdefault(cell, []).append((layer, head))
    for cell, places in kinds.items():
        parts.append(_filled(places, wide, tall, "rgb({},{},{})".format(*cell.tint), cell.text()))
    for layer, row in enumerate(panel.cells):
        texts = [cell.look.letter + cell.signs for cell in row]
        parts.append(_texts(texts, [cell.ink for cell in row], layer, wide, tall))
    width = _width(heads, wide, panel.phase)
    return svg(f"{panel.phase}: what each head does", width, TOP + layers * tall + 4, "".join(parts))


@dataclass(frozen=True, slots=True)
class Scale:
    """Which colour a value has, and how it is spelled."""

    low: float
    high: float
    logarithmic: bool
    spelled: Callable[[float], str]
    short: Callable[[float], str]

    @classmethod
    def over(
        cls,
        maps: Sequence[Values],
        spelled: Callable[[float], str],
        short: Callable[[float], str],
        *,
        logarithmic: bool = False,
    ) -> "Scale":
        """One scale for several maps, so that their colours compare."""
        known = [v for values in maps for row in values for v in row if v is not None and math.isfinite(v)]
        if logarithmic:
            known = [value for value in known if value > 0]
            return cls(min(known, default=0.01), max(known, default=1.0), True, spelled, short)
        return cls(min([0.0, *known]), max(known, default=1.0), False, spelled, short)

    def colour(self, value: float) -> int:
        """A number in RAMP."""
        if self.high <= self.low or (self.logarithmic and value <= 0):
            return 0
        low, high, own = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        return min(len(RAMP) - 1, max(0, int(len(RAMP) * (own - low) / (high - low))))

    def bar(self) -> str:
        """The colours, with what the first and the last mean."""
        cell, tall = 22, 12
        parts = [f'<path fill="{c}" d="M{40 + n * cell} 0h{cell}v{tall}h-{cell}z"/>' for n, c in enumerate(RAMP)]
        low, high = escape(self.spelled(self.low)), escape(self.spelled(self.high))
        parts.append(f'<text class="small end" x="36" y="10">{low}</text>')
        parts.append(f'<text class="small" x="{44 + len(RAMP) * cell}" y="10">{high}</text>')
        return svg("colours", 100 + len(RAMP) * cell, tall + 2, "".join(parts))


def heat_map(title: str, values: Values, scale: Scale) -> str:
    """With numbers in the cells where there are few heads."""
    layers, heads = len(values), len(values[0])
    wide, tall = (30 if heads <= FEW_HEADS else 12), _height(layers)
    parts = [_frame(title, layers, heads, wide, tall)]
    colours: dict[int, list[tuple[int, int]]] = {}
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            if value is not None and math.isfinite(value):
                colours.setdefault(scale.colour(value), []).append((layer, head))
    parts += [_filled(places, wide, tall, RAMP[colour]) for colour, places in sorted(colours.items())]
    for layer, row in enumerate(values):
        texts = ["–" if each is None else "?" if not math.isfinite(each) else scale.short(each) for each in row]
        inks = [_ink(each, scale) for each in row]
        if heads <= FEW_HEADS:
            parts.append(_texts(texts, inks, layer, wide, tall))
    return svg(title, _width(heads, wide, title), TOP + layers * tall + 4, "".join(parts))


def _ink(value: float | None, scale: Scale) -> str:
    if value is None or not math.isfinite(value):
        return "ink"
    return "black" if scale.colour(value) < LIGHT else "white"


def _width(heads: int, wide: int, title: str) -> float:
    return LEFT + max(heads * wide, 7.5 * len(title)) + 2


def _height(layers: int) -> int:
    return 17 if layers <= TALL else 13


def _frame(title: str, layers: int, heads: int, wide: int, tall: int) -> str:
    parts = [f'<text class="bold" x="{LEFT}" y="12">{escape(title)}</text>']
    for head in range(0, heads, 1 if heads <= FEW_HEADS else 5):
        parts.append(f'<text class="small mid" x="{LEFT + wide * (head + 0.5):g}" y="{TOP - 5}">{head}</text>')
    for layer in range(layers):
        at = TOP + tall * (layer + 0.5) + 3.5
        parts.append(f'<text class="small end" x="{LEFT - 5}" y="{at:g}">{layer}</text>')
    return "".join(parts)


def _filled(places: Sequence[tuple[int, int]], wide: int, tall: int, colour: str, title: str = "") -> str:
    """One path for all cells of a colour: a page has thousands."""
    cells = "".join(f"M{LEFT + head * wide} {TOP + layer * tall}h{wide}v{tall}h-{wide}z" for layer, head in places)
    told = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="cells" fill="{colour}" d="{cells}">{told}</path>'


def _texts(texts: Sequence[str], inks: Sequence[str], layer: int, wide: int, tall: int) -> str:
    at = TOP + tall * (layer + 0.5) + 3.5
    parts: Mapping[str, list[str]] = {ink: [] for ink in inks}
    for head, (text, ink) in enumerate(zip(texts, inks, strict=True)):
        parts[ink].append(f'<tspan x="{LEFT + wide * (head + 0.5):g}">{escape(text)}</tspan>')
    return "".join(f'<text class="cell {ink}" y="{at:g}">{"".join(own)}</text>' for ink, own in parts.items())
