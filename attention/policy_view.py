"""A policy for people to look at: what each head does in words, and how much of its past it would read."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.packaged import find_policy_file
from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.policy_backends import (
    Backend,
    BlockSparseBackend,
    BudgetEntry,
    DenseBackend,
    DoubleSparsityBackend,
    HeadEntry,
    KeepEntry,
    SinkRecentBackend,
    VerticalSlashBackend,
)
from gossamer.attention.policy_file import PolicyError, PolicyFile, load_policy_file

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Keep = Literal["all"] | KeepEntry

# Parameters that change nothing at these values are not worth a reader's time.
_UNSAID: Mapping[str, object] = MappingProxyType(
    {"above": 0, "mass": 1.0, "correct_dropped": False, "least": 0, "recent": 0}
)


@dataclass(frozen=True, slots=True)
class Look:
    """How a backend is drawn: one letter, and red, green and blue of 0 to 255."""

    letter: str
    colour: tuple[int, int, int]


LOOKS: Mapping[str, Look] = MappingProxyType(  # colours that stay apart for colour-blind readers
    {
        "dense": Look("D", (77, 77, 77)),
        "sink-recent": Look("S", (230, 159, 0)),
        "block-sparse": Look("B", (0, 158, 115)),
        "vertical-slash": Look("V", (204, 121, 167)),
        "double-sparsity": Look("T", (0, 114, 178)),
        "learned-gate": Look("G", (123, 63, 160)),
    }
)


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A policy file, and what it means with everything that it names."""

    path: Path
    file: PolicyFile
    policy: AttentionPolicy


def load_policy(asked: str) -> LoadedPolicy:
    """`asked`: a path, or the name of a packaged policy. Raises PolicyError."""
    if asked == "dense":
        raise PolicyError(
            "'dense' needs no file, because every head of any model reads and keeps everything; name a policy file, or "
            "a packaged policy."
        )
    path = find_policy_file(asked)
    file = load_policy_file(path)
    return LoadedPolicy(path, file, file.policy(Artefacts(path.parent)))


@dataclass(frozen=True, slots=True)
class Nominal:
    """The share of the causal keys that a head reads, by its parameters alone: before rounding to pages, and without
    what every query block reads anyway. `share` None: unknown until it is measured; `at_most`: the share is a limit."""

    share: float | None
    at_most: bool = False

    def text(self) -> str:
        if self.share is None:
            return "unknown until measured"
        digits = 2 if self.share < 0.01 else 1 if self.share < 1 else 0
        return f"{'at most ' if self.at_most else ''}{100 * self.share:.{digits}f}%"


def nominal_density(backend: Backend, keep: Keep, length: int) -> Nominal:
    """For a query behind `length` tokens, its own included, of a head that keeps `keep`."""
    kept = length if isinstance(keep, str) else keep.sink + keep.recent
    read, at_most = _tokens_read(backend, length)
    return Nominal(None if read is None else min(read, kept, length) / length, at_most)


def _tokens_read(backend: Backend, length: int) -> tuple[float | None, bool]:
    """How many tokens of `length`, None where that depends on the model; and whether this is a limit."""
    if isinstance(backend, DenseBackend):
        return length, False
    if isinstance(backend, SinkRecentBackend):
        return backend.sink + backend.recent, False
    if length <= backend.above:
        return length, False
    if isinstance(backend, VerticalSlashBackend):
        return backend.columns + backend.diagonals, backend.mass < 1
    if isinstance(backend, DoubleSparsityBackend):
        return backend.tokens, backend.mass < 1
    budget = backend.budget
    count = budget.tokens if budget.share is None else budget.share * length
    return None if count is None else max(count, budget.recent), False


def in_words(backend: Backend) -> str:
    """The backend and the parameters that matter: "sink-recent (sink 64, recent 256)"."""
    parameters = []
    for name in type(backend).model_fields:
        value = getattr(backend, name)
        if name == "backend" or (name in _UNSAID and value == _UNSAID[name]):
            continue
        if name == "stride" and isinstance(backend, BlockSparseBackend):
            if backend.score != "antidiagonal":
                continue
            value = value or 16
        parameters.append(_budget_in_words(value) if isinstance(value, BudgetEntry) else _parameter(name, value))
    return f"{backend.backend} ({', '.join(parameters)})" if parameters else backend.backend


def _budget_in_words(budget: BudgetEntry) -> str:
    given = budget.model_dump(exclude_none=True)
    return "budget " + ", ".join(_parameter(name, value) for name, value in given.items() if value != _UNSAID.get(name))


def _parameter(name: str, value: object) -> str:
    if value is True:
        return name
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def keep_in_words(keep: Keep) -> str:
    return keep if isinstance(keep, str) else f"sink {keep.sink}, recent {keep.recent}"


@dataclass(frozen=True, slots=True)
class Cell:
    """What one head does in one phase, at one length. Equal cells are drawn alike and share a line of the legend."""

    backend: Backend
    keep: Keep
    nominal: Nominal

    @property
    def look(self) -> Look:
        return LOOKS[self.backend.backend]

    @property
    def streams(self) -> bool:
        """Whether the head gives the memory of the tokens between sink and window back."""
        return self.keep != "all"

    @property
    def signs(self) -> str:
        """Beside it: "~" for a head that streams, "?" for a density that is unknown."""
        return ("~" if self.streams else "") + ("?" if self.nominal.share is None else "")

    @property
    def tint(self) -> tuple[int, int, int]:
        """The backend's colour, the paler the less is read (by the square root, so that 1% and 10% can be told apart);
        halfway where that is unknown."""
        share = self.nominal.share
        weight = 0.5 if share is None else 0.15 + 0.85 * share**0.5
        red, green, blue = (round(255 + weight * (each - 255)) for each in self.look.colour)
        return red, green, blue

    @property
    def ink(self) -> Literal["black", "white"]:
        """What is read more easily on the tint."""
        red, green, blue = self.tint
        return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"

    def text(self) -> str:
        """For a legend."""
        kept = f", keeps {keep_in_words(self.keep)}" if self.streams else ""
        return f"{in_words(self.backend)}{kept}: {self.nominal.text()}"


@dataclass(frozen=True, slots=True)
class Panel:
    """One phase of an operating point. `cells[layer][kv_head]`."""

    phase: Phase
    cells: tuple[tuple[Cell, ...], ...]

    def __iter__(self) -> Iterator[Cell]:
        return (cell for layer in self.cells for cell in layer)

    def mean(self) -> str:
        """The mean nominal density, and over which heads when not over all."""
        known = [cell.nominal for cell in self if cell.nominal.share is not None]
        heads = sum(map(len, self.cells))
        if not known:
            return "unknown until measured"
        mean = Nominal(sum(each.share or 0.0 for each in known) / len(known), any(each.at_most for each in known))
        return mean.text() + (
            "" if len(known) == heads else f" over the {len(known)} of {heads} heads where it is known"
        )


@dataclass(frozen=True, slots=True)
class PointView:
    """An operating point of a policy file, seen at a length."""

    title: tuple[str, ...]  # lines
    point: str
    length: int
    panels: tuple[Panel, ...]

    def legend(self) -> list[tuple[Cell, dict[Phase, int]]]:
        """Each kind of cell, with how many heads do it in each phase."""
        counts = {panel.phase: Counter(panel) for panel in self.panels}
        order = list(LOOKS)
        kinds = sorted(
            dict.fromkeys(cell for panel in self.panels for cell in panel),
            key=lambda cell: (order.index(cell.backend.backend), -(cell.nominal.share or 0.0), cell.text()),
        )
        return [(cell, {phase: count[cell] for phase, count in counts.items()}) for cell in kinds]

    def means(self) -> tuple[str, ...]:
        """The lines below the panels."""
        means = (f"  {panel.phase}: {panel.mean()}" for panel in self.panels)
        return f"mean nominal density at {self.length} tokens", *means


def view_point(file: PolicyFile, point: str, length: int) -> PointView:
    """Raises KeyError for a point that the file has not, PolicyError for rows that name heads the model has not."""
    entries = file.entries(point)
    panels = tuple(
        Panel(phase, tuple(tuple(_cell(entry, phase, length) for entry, _ in layer) for layer in entries))
        for phase in PHASES
    )
    return PointView(_title(file, point), point, length, panels)


def _cell(entry: HeadEntry, phase: Phase, length: int) -> Cell:
    backend = entry.prefill if phase == "prefill" else entry.decode
    return Cell(backend, entry.keep, nominal_density(backend, entry.keep, length))


def _title(file: PolicyFile, point: str) -> tuple[str, ...]:
    """Name, model and provenance."""
    model, source = file.model, file.provenance
    heads = f"{model.layers} layers of {model.kv_heads} KV heads"
    known = " ".join(each for each in (model.name, model.model_type and f"({model.model_type})") if each)
    note = f": {source.note}" if source.note else ""
    default = ", the default" if point == next(iter(file.points)) else ""
    return (
        f"{file.name}, operating point {point}{default}",
        printable(f"model: {f'{known}, ' if known else ''}{heads}"),
        printable(f"provenance: {source.source}{note}"),
    )


def printable(text: str) -> str:
    """On one line, and without characters that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
