"""The policy file: YAML, one per model, for people. docs/policies.md describes it; the classes here are its schema."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gossamer.attention.policy import AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import Dense, Selector, SinkRecent
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent, Retention

VERSION = 1
MOST_BYTES = 16 * 2**20


class PolicyError(Exception):
    """A policy file cannot be used. The message is one sentence that says what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DenseBackend(_Strict):
    """Reads everything."""

    backend: Literal["dense"]

    def selector(self) -> Selector:
        return Dense()


class SinkRecentBackend(_Strict):
    """Reads the first `sink` tokens and the last `recent`, rounded up to pages."""

    backend: Literal["sink-recent"]
    sink: int = Field(ge=0, le=2**30)
    recent: int = Field(ge=1, le=2**30)

    def selector(self) -> Selector:
        return SinkRecent(self.sink, self.recent)


Backend = Annotated[DenseBackend | SinkRecentBackend, Field(discriminator="backend")]


class KeepEntry(_Strict):
    """Tokens that stay in memory: the first `sink` and the last `recent`."""

    sink: int = Field(ge=0, le=2**30)
    recent: int = Field(ge=1, le=2**30)


class HeadEntry(_Strict):
    """What some heads do. A head with `keep` is a streaming head: the tokens in between give their memory back."""

    prefill: Backend = DenseBackend(backend="dense")
    decode: Backend = DenseBackend(backend="dense")
    keep: Literal["all"] | KeepEntry = "all"

    @field_validator("prefill", "decode", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"backend": value} if isinstance(value, str) else value

    def head_policy(self) -> HeadPolicy:
        keep: Retention = KeepAll() if self.keep == "all" else KeepSinkRecent(self.keep.sink, self.keep.recent)
        return HeadPolicy(self.prefill.selector(), self.decode.selector(), keep)


class Row(HeadEntry):
    """A `HeadEntry` for some layers and KV heads: "all", one number, or ranges such as "0-3, 7"."""

    layers: str | int = "all"
    heads: str | int = "all"


class PointEntry(_Strict):
    """One operating point: the default entry, then rows; a later row wins over an earlier one."""

    default: HeadEntry = HeadEntry()
    rows: tuple[Row, ...] = Field(default=(), max_length=100_000, strict=False)


class ModelEntry(_Strict):
    """The model that the file was made for. What is left out is not checked."""

    name: str | None = None
    model_type: str | None = None
    layers: int = Field(ge=1, le=10_000)
    kv_heads: int = Field(ge=1, le=10_000)
    query_heads: int | None = None
    head_dim: int | None = None


class Provenance(_Strict):
    """Where the numbers come from."""

    source: str  # "written by hand", "profiled", "imported"
    note: str = ""


class PolicyFile(_Strict):
    """A whole file. The first operating point is the default."""

    gossamer_policy: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    model: ModelEntry
    provenance: Provenance
    points: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")], PointEntry] = Field(
        min_length=1, max_length=16
    )

    def policy(self) -> AttentionPolicy:
        """Every row written out. Raises PolicyError for rows that name heads the model has not."""
        points = (self._point(name, entry) for name, entry in self.points.items())
        return AttentionPolicy(self.name, tuple(points))

    def _point(self, name: str, entry: PointEntry) -> OperatingPoint:
        layers, kv_heads = self.model.layers, self.model.kv_heads
        default = _within_reach(entry.default.head_policy(), f"the default of operating point {name!r}")
        heads = [[default] * kv_heads for _ in range(layers)]
        for number, row in enumerate(entry.rows, 1):
            where = f"row {number} of operating point {name!r}"
            policy = _within_reach(row.head_policy(), where)
            for layer in _numbers(row.layers, layers, "layer", where):
                for head in _numbers(row.heads, kv_heads, "KV head", where):
                    heads[layer][head] = policy
        return OperatingPoint(name, tuple(tuple(layer) for layer in heads))


def load_policy_file(path: Path) -> PolicyFile:
    """Read and check one file. Raises PolicyError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise PolicyError(f"The policy file {path} is larger than {MOST_BYTES >> 20} MiB; it cannot be a policy.")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"The policy file {path} cannot be read: {error}.") from error
    try:
        raw = yaml.load(text, Loader=_PlainLoader)
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
    faults = [(_place(fault["loc"]), fault["msg"]) for fault in error.errors(include_url=False)]
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


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases (no expansion bombs) and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"the key {key.value!r} is given twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


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
