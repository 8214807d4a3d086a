"""Charts as inline SVG, in the colours that the page gives to classes: axes, scatter, bars and intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType

WIDTH, HEIGHT = 378, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
LETTER, LINE = 5.9, 13.0  # pixels of a letter, and between labels
ZERO = 0.1  # of a logarithmic axis, where what is 0 has its place
SHAPES: Mapping[str, str] = MappingProxyType(
    {
        "circle": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "square": "m-4 -4h8v8h-8z",
        "triangle": "m0 -5l5 9h-10z",
        "diamond": "m0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        "star": "m0 -7l2 5h5l-4 3l1.5 5.5l-4.5 -3.5l-4.5 3.5l1.5 -5.5l-4 -3h5z",
        "cross": "m-3.5 -3.5l7 7m0 -7l-7 7",
    }
)


@dataclass(frozen=True, slots=True)
class Axis:
    """ticks: where, and what stands there. A logarithmic axis has a place for 0 at its beginning."""

    name: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """0 to 1"""
        if not self.logarithmic:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return 0.0
        whole = math.log10(self.high / self.low)
        return ZERO + (1 - ZERO) * max(0.0, math.log10(value / self.low) / whole)


def linear(name: str, values: Iterable[float]) -> Axis:
    """From 0, or from the least where that is below."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, *known])
    rough = ((high - low) or 1.0) / 5
    step = 10 ** math.floor(math.log10(rough))
    step *= next(each for each in (1, 2, 5, 10) if each * step >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    ticks = tuple((n * step, f"{n * step:g}") for n in range(first, last + 1))
    return Axis(name, first * step, last * step, ticks)


def logarithmic(name: str, values: Iterable[float]) -> Axis:
    """Whole powers of ten."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    first, last = (
        (math.floor(math.log10(min(known))), math.ceil(math.log10(max(known) * 1.05))) if known else (-3.0, 0.0)
    )
    last = max(last, first + 1)
    every = 1 + (last - first) // 7
    powers = range(int(first), int(last) + 1, int(every))
    ticks = ((0.0, "0"), *((10.0**n, f"{10.0**n:g}" if n > -5 else f"1e{n}") for n in powers))
    return Axis(name, 10.0**first, 10.0**last, ticks, True)


@dataclass(frozen=True, slots=True)
class Mark:
    """kind: classes that give it its colour. title: shown when pointed at."""

    x: float
    y: float
    kind: str
    shape: str = "circle"
    label: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Through points; label at its end."""

    points: tuple[tuple[float, float], ...]
    kind: str
    label: str = ""


def scatter(title: str, x: Axis, y: Axis, marks: Sequence[Mark], lines: Sequence[Line] = ()) -> str:
    """What is not finite is left out."""
    parts = [_axes(x, y)]
    for number, line in enumerate(lines):
        path = "L".join(f"{_x(x, a):.1f} {_y(y, b):.1f}" for a, b in line.points)
        parts.append(f'<path class="line {line.kind}" d="M{path}"/>')
        if line.label:
            (_, low), (_, high) = line.points[0], line.points[-1]
            place = f'y="{_y(y, low if low == high else high) - 4:.1f}"'  # at either end in turn: lines may lie close
            end, at = (" end", WIDTH - RIGHT - 3) if number % 2 else ("", LEFT + 4)
            parts.append(f'<text class="small {line.kind}{end}" x="{at}" {place}>{escape(line.label)}</text>')
    own = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    parts += [_mark(mark, _x(x, mark.x), _y(y, mark.y)) for mark in own]
    parts += _labels([(mark, _x(x, mark.x), _y(y, mark.y)) for mark in own if mark.label])
    return svg(title, WIDTH, HEIGHT, "".join(parts))


def staircase(pairs: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The edge of what pairs reach where less is better in both: those that no other beats, with the corners."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(pair for pair in pairs if all(map(math.isfinite, pair))):
        if not best or y < best[-1][1]:
            if best:
                best.append((x, best[-1][1]))
            best.append((x, y))
    return tuple(best)


@dataclass(frozen=True, slots=True)
class Series:
    """One operating point's share at each length, and between what it lies."""

    kind: str
    shape: str
    values: tuple[tuple[float, float, float] | None, ...]  # low, share, high


def intervals(title: str, columns: Sequence[str], series: Sequence[Series], name: str) -> str:
    """Shares of 0 to 1 by length, side by side, with whiskers."""
    width, height = max(170, 26 + len(columns) * (14 + 13 * len(series))), 150
    left, top, bottom = 34, 20, 38
    tall = height - top - bottom
    parts = [f'<text class="bold" x="{left - 28}" y="11">{escape(title)}</text>']
    for share in (0, 0.5, 1):
        at = top + tall * (1 - share)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{width}"/>')
        parts.append(f'<text class="small end" x="{left - 4}" y="{at + 3:.1f}">{100 * share:.0f}%</text>')
    room = (width - left) / len(columns)
    for number, column in enumerate(columns):
        middle = left + room * (number + 0.5)
        parts.append(f'<text class="small mid" x="{middle:.1f}" y="{height - 19}">{escape(column)}</text>')
        for place, one in enumerate(series):
            value = one.values[number]
            if value is None:
                continue
            at = middle + 13 * (place - (len(series) - 1) / 2)
            low, share, high = (top + tall * (1 - each) for each in value)
            parts.append(f'<path class="line {one.kind}" d="M{at:.1f} {low:.1f}V{high:.1f}"/>')
            parts.append(f'<path class="mark {one.kind}" d="M{at:.1f} {share:.1f}{SHAPES[one.shape]}"/>')
    parts.append(f'<text class="small mid" x="{left + (width - left) / 2:.1f}" y="{height - 5}">{escape(name)}</text>')
    return svg(f"{title}: accuracy by length", width, height, "".join(parts))


def bars(title: str, names: Sequence[str], shares: Sequence[float], note: str = "") -> str:
    """Upright, each a share of the whole."""
    width, height, top, bottom = max(210, 30 * len(names)), 118, 16, 30
    room, tall = width / len(names), height - top - bottom
    most = max([share for share in shares if math.isfinite(share)], default=0.0) or 1.0
    parts = [f'<path class="grid" d="M0 {height - bottom}H{width}"/>']
    for number, (name, share) in enumerate(zip(names, shares, strict=True)):
        if not math.isfinite(share):
            continue
        long, middle = tall * share / most, room * (number + 0.5)
        box = f'x="{room * number + 2:.1f}" y="{top + tall - long:.1f}" width="{room - 4:.1f}" height="{long:.1f}"'
        parts.append(f'<rect class="bar" {box}/>')
        parts.append(
            f'<text class="small mid" x="{middle:.1f}" y="{top + tall - long - 3:.1f}">{100 * share:.0f}</text>'
            f'<text class="small mid" x="{middle:.1f}" y="{height - 18}">{escape(name)}</text>'
        )
    parts.append(f'<text class="small mid" x="{width / 2}" y="{height - 4}">{escape(note)}</text>')
    return svg(title, width, height, "".join(parts))


def svg(title: str, width: float, height: float, inside: str) -> str:
    """A picture of that many pixels, with a name for those who cannot see it."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg role="img" aria-label="{escape(title)}" {size}>{inside}</svg>'


def _x(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis.at(value)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.at(value)


def _axes(x: Axis, y: Axis) -> str:
    floor, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value, text in x.ticks:
        at = _x(x, value)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{floor}"/>')
        parts.append(f'<text class="small mid" x="{at:.1f}" y="{floor + 14}">{escape(text)}</text>')
    for value, text in y.ticks:
        at = _y(y, value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{end}"/>')
        parts.append(f'<text class="small end" x="{LEFT - 5}" y="{at + 3.5:.1f}">{escape(text)}</text>')
    parts.append(f'<text class="mid" x="{(LEFT + end) / 2}" y="{HEIGHT - 8}">{escape(x.name)}</text>')
    middle = (TOP + floor) / 2
    parts.append(f'<text class="mid" transform="translate(12 {middle}) rotate(-90)">{escape(y.name)}</text>')
    return "".join(parts)


def _mark(mark: Mark, x: float, y: float) -> str:
    title = f"<title>{escape(mark.title)}</title>" if mark.title else ""
    return f'<path class="mark {mark.kind}" d="M{x:.1f} {y:.1f}{SHAPES[mark.shape]}">{title}</path>'


def _labels(placed: Sequence[tuple[Mark, float, float]]) -> list[str]:
    """Beside the marks, to the left of those near the right edge; none on top of another."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []  # from, to, height
    for mark, x, y in sorted(placed, key=lambda each: each[2]):
        wide = LETTER * len(mark.label)
        before = x + 9 + wide > WIDTH
        first, last = (x - 9 - wide, x - 9) if before else (x + 9, x + 9 + wide)
        at = y + 4
        for begin, end, height in sorted(taken, key=lambda each: each[2]):
            if begin < last and first < end and abs(at - height) < LINE:
                at = height + LINE
        taken.append((first, last, at))
        end_class = " end" if before else ""
        place = f'x="{x - 9 if before else x + 9:.1f}" y="{at:.1f}"'
        parts.append(f'<text class="label {mark.kind}{end_class}" {place}>{escape(mark.label)}</text>')
    return parts
