"""The policy file: YAML, one per model, for people. docs/policies.md describes it; the classes here are its schema."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from gossamer.attention.artefacts import ArtefactError, Artefacts
from gossamer.attention.plain_yaml import load_plain_yaml
from gossamer.attention.policy import AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.policy_backends import HeadEntry, Strict
from gossamer.attention.selectors import SinkRecent
from gossamer.kvcache.retention import KeepSinkRecent

VERSION = 1
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MOST_BYTES = 16 * 2**20


class PolicyError(Exception):
    """A policy file cannot be used. The message is one sentence that says what to do."""


class Row(HeadEntry):
    """A `HeadEntry` for some layers and KV heads: "all", one number, or ranges such as "0-3, 7"."""

    layers: str | int = "all"
    heads: str | int = "all"


class PointEntry(Strict):
    """One operating point: the default entry, then rows; a later row wins over an earlier one. The first layers are
    dense whatever these say. `safer` names the point that a server falls back to when live quality is too low; left
    out, it is the first dense point."""

    safer: str | None = None
    default: HeadEntry = HeadEntry()
    first_dense_layers: int = Field(default=0, ge=0, le=10_000)
    rows: tuple[Row, ...] = Field(default=(), max_length=100_000, strict=False)


class ModelEntry(Strict):
    """The model that the file was made for. What is left out is not checked."""

    name: str | None = None
    model_type: str | None = None
    layers: int = Field(ge=1, le=10_000)
    kv_heads: int = Field(ge=1, le=10_000)
    query_heads: int | None = None
    head_dim: int | None = None


class SourceFile(Strict):
    """A file that an imported policy was made from."""

    name: str  # without its folder
    format: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    origin: str = ""  # who published it, at which commit, under which licence


class Provenance(Strict):
    """Where the numbers come from."""

    source: str  # "written by hand", "profiled", "imported"
    note: str = ""
    files: tuple[SourceFile, ...] = Field(default=(), max_length=16, strict=False)
    approximations: tuple[str, ...] = Field(default=(), max_length=64, strict=False)  # what was not taken as it stands


class PolicyFile(Strict):
    """A whole file. The first operating point is the default."""

    gossamer_policy: Literal[1]
    name: str = Field(pattern=NAME)
    model: ModelEntry
    provenance: Provenance
    points: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")], PointEntry] = Field(
        min_length=1, max_length=16, json_schema_extra={"additionalProperties": False}
    )

    @field_validator("points")
    @classmethod
    def _safer_points(cls, points: dict[str, PointEntry]) -> dict[str, PointEntry]:
        for name, entry in points.items():
            seen, safer = [name], entry.safer
            while safer is not None:
                if safer not in points:
                    raise ValueError(f"operating point {seen[-1]!r} names {safer!r} as safer, which does not exist")
                if safer in seen:
                    raise ValueError(f"operating points {', '.join(map(repr, seen))} name each other as safer")
                seen.append(safer)
                safer = points[safer].safer
        return points

    def policy(self, artefacts: Artefacts) -> AttentionPolicy:
        """Every row written out, with the files that it names. Raises PolicyError for rows that name heads the model
        has not, and for files that cannot be used."""
        points = (self._point(name, artefacts) for name in self.points)
        return AttentionPolicy(self.name, tuple(points))

    def entries(self, point: str) -> list[list[tuple[HeadEntry, str]]]:
        """[layer][kv_head], what the file says of the head at an operating point, and where it says so. Raises
        PolicyError for rows that name heads the model has not."""
        entry, layers, kv_heads = self.points[point], self.model.layers, self.model.kv_heads
        said: list[list[tuple[HeadEntry, str]]] = [
            [(entry.default, f"the default of operating point {point!r}")] * kv_heads for _ in range(layers)
        ]
        for number, row in enumerate(entry.rows, 1):
            where = f"row {number} of operating point {point!r}"
            for layer in _numbers(row.layers, layers, "layer", where):
                for head in _numbers(row.heads, kv_heads, "KV head", where):
                    said[layer][head] = row, where
        first = entry.first_dense_layers
        if first > layers:
            raise PolicyError(
                f"Operating point {point!r} has first_dense_layers {first}, but the model has {layers} layers."
            )
        dense: tuple[HeadEntry, str] = HeadEntry(), f"the first dense layers of operating point {point!r}"
        return [[dense] * kv_heads] * first + said[first:]

    def _point(self, name: str, artefacts: Artefacts) -> OperatingPoint:
        heads: list[tuple[HeadPolicy, ...]] = []
        for layer, entries in enumerate(self.entries(name)):
            made: dict[int, HeadPolicy] = {}
            for head_entry, where in entries:
                if id(head_entry) not in made:
                    made[id(head_entry)] = self._head_policy(head_entry, where, layer, artefacts)
            heads.append(tuple(made[id(head_entry)] for head_entry, _ in entries))
        return OperatingPoint(name, tuple(heads), self.points[name].safer)

    def _head_policy(self, entry: HeadEntry, where: str, layer: int, artefacts: Artefacts) -> HeadPolicy:
        try:
            policy = entry.head_policy(layer, self.model.kv_heads, self.model.head_dim, artefacts)
        except ArtefactError as error:
            raise PolicyError(f"In {where}: {error}") from error
        except ValueError as error:
            raise PolicyError(f"In {where}: {str(error).rstrip('.')}.") from error
        return _within_reach(policy, where)


def load_policy_file(path: Path) -> PolicyFile:
    """Read and check one file. Raises PolicyError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise PolicyError(f"The policy file {path} is larger than {MOST_BYTES >> 20} MiB; it cannot be a policy.")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"The policy file {path} cannot be read: {error}.") from error
    try:
        raw = load_plain_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of dates, long numbers, deep nesting
        raise PolicyError(f"The policy file {path} is not plain YAML: {' '.join(str(error).split())[:300]}.") from error
    if not isinstance(raw, dict) or "gossamer_policy" not in raw:
        raise PolicyError(f"{path} is not a policy file: it must begin with 'gossamer_policy: {VERSION}'.")
    if type(raw["gossamer_policy"]) is not int or raw["gossamer_policy"] != VERSION:
        raise PolicyError(
            f"The policy file {path} is of version {raw['gossamer_policy']!r}; this server reads version {VERSION}."
        )
    try:
        return PolicyFile.model_validate(raw)
    except ValidationError as error:
        raise PolicyError(f"The policy file {path} is wrong at {_first_fault(error)}.") from error


def _first_fault(error: ValidationError) -> str:
    """Where the first fault is, in the words of the file, and what it is. Of the kinds that a place allows, the one
    that got furthest was meant; where none got further, all are said."""
    found = error.errors(include_url=False)
    faults = [(_place(fault["loc"]), fault["msg"].removeprefix("Value error, ")) for fault in found]
    top = faults[0][0]
    place = max((place for place, _ in faults if place[: len(top)] == top), key=len)
    messages = [re.sub(r" or instance of \w+", "", message) for at, message in faults if at == place]
    return f"{'.'.join(place)}: {'; or '.join(dict.fromkeys(messages))}"


def _place(location: tuple[str | int, ...]) -> tuple[str, ...]:
    """Without what pydantic adds: the kind of a union that it tried."""
    kinds = ("str", "int", "literal['all']", "KeepEntry")
    return tuple(str(part) for part in location if part not in kinds)


def check_model(
    file: PolicyFile, *, model_type: str, layers: int, kv_heads: int, query_heads: int, head_dim: int
) -> None:
    """Refuse a policy made for another model. Raises PolicyError."""
    actual: dict[str, int | str] = {
        "layers": layers,
        "kv_heads": kv_heads,
        "query_heads": query_heads,
        "head_dim": head_dim,
        "model_type": model_type,
    }
    for name, value in actual.items():
        wanted = getattr(file.model, name)
        if wanted is not None and wanted != value:
            raise PolicyError(
                f"The policy {file.name!r} is for a model with {name} {wanted}, but this model has {name} {value}; "
                "choose a policy that was made for this model."
            )


def _within_reach(head: HeadPolicy, where: str) -> HeadPolicy:
    """Refuse a selector that would read what the head's retention rule releases."""
    if isinstance(head.keep, KeepSinkRecent):
        for selector in (head.prefill, head.decode):
            if isinstance(selector, SinkRecent) and (
                selector.sink > head.keep.sink or selector.recent > head.keep.recent
            ):
                raise PolicyError(
                    f"In {where}, sink-recent reads {selector.sink} + {selector.recent} tokens, but the head keeps "
                    f"only {head.keep.sink} + {head.keep.recent}; keep more, or read less."
                )
    return head


def _numbers(spec: str | int, count: int, what: str, where: str) -> Sequence[int]:
    """ "all", 3, or "0-3, 7" -> the numbers."""
    if spec == "all":
        return range(count)
    numbers: list[int] = []
    for part in str(spec).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise PolicyError(f'In {where}, {spec!r} is not a list of {what}s; write "all", 3, or "0-3, 7".')
        stop = int(last) if dash else int(first)
        if stop >= count:
            raise PolicyError(f"In {where}, {what} {stop} does not exist: the model has {what}s 0 to {count - 1}.")
        numbers.extend(range(int(first), stop + 1))
    return numbers
