"""What a report is made of, before it becomes a page or a text; and how its numbers are spelled."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gossamer.attention.policy_view import PointView
from gossamer.attention.profiling.profile import Point, Profile


@dataclass(frozen=True, slots=True)
class Table:
    """The first `words` columns hold text, the others numbers. marked: (row, column) of cells that must not be
    overlooked. folded: long, and shown on a page when asked for."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    caption: str = ""
    marked: frozenset[tuple[int, int]] = frozenset()
    folded: bool = False

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.columns


@dataclass(frozen=True, slots=True)
class Picture:
    """svg: safe to put into a page as it is. A text has the caption's numbers in its tables."""

    svg: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures side by side."""

    pictures: tuple[Picture, ...]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class HeadMap:
    """What `gossamer policy show` draws. windows: the layers in which a policy changes nothing."""

    view: PointView
    windows: tuple[int, ...]


Part = Table | Gallery | HeadMap


@dataclass(frozen=True, slots=True)
class Section:
    """said: paragraphs before the parts."""

    anchor: str
    title: str
    said: tuple[str, ...]
    parts: tuple[Part, ...] = ()


def percent(share: float) -> str:
    """As `gossamer policy show` spells it: 33.0%, 0.98%."""
    if not math.isfinite(share):
        return "unknown"
    return f"{100 * share:.{2 if 0 < share < 0.01 else 1}f}%"


def nats(value: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    return "0" if value == 0 else f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"


def points(value: float) -> str:
    """Hundredths of accuracy, without a minus in front of zero."""
    return f"{value:.1f}".replace("-0.0", "0.0") if math.isfinite(value) else "unknown"


def lots(value: float) -> str:
    """A bound on points, as it was given."""
    return f"{value:g} point{'' if value == 1 else 's'}"


def seconds(value: float) -> str:
    if value >= 120:
        return f"{int(value) // 3600} h {int(value) % 3600 // 60} min" if value >= 7200 else f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 0.1 else f"{1e3 * value:.3g} ms" if value >= 1e-4 else f"{1e6 * value:.3g} µs"


def size(count: int) -> str:
    """Bytes."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def number_of(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def listed(parts: Iterable[str]) -> str:
    """a, b and c"""
    *before, last = parts
    return f"{', '.join(before)} and {last}" if before else last


def longest(profile: Profile) -> int:
    return max(profile.settings.lengths)


def sparse(profile: Profile) -> tuple[Point, ...]:
    """The operating points beside dense."""
    return profile.points[1:]


def heads_of(profile: Profile) -> Iterator[tuple[int, int]]:
    """(layer, KV head) of all that a policy can change."""
    return ((layer, head) for layer in profile.shape.free for head in range(profile.shape.kv_heads))


def default_point(profile: Profile) -> Point:
    """The first of the policy file."""
    by_name: Mapping[str, Point] = {point.name: point for point in profile.points}
    return by_name[next(iter(profile.file.points))]
