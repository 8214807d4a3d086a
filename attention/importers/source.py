"""What an importer is given, and what it gives back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard, TypeVar

from torch import Tensor

from gossamer.attention.importers.foreign import ForeignFile, ImportRefused
from gossamer.attention.importers.target import Target
from gossamer.attention.policy_backends import DenseBackend, HeadEntry, KeepEntry, SinkRecentBackend

Item = TypeVar("Item")
Heads = tuple[tuple[HeadEntry, ...], ...]  # [layer][KV head]

DENSE_HEAD = HeadEntry()
MOST_LAYERS = 10_000
MOST_ITEMS = 1 << 20  # of a table


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beside the files; None: nothing. Raises ImportRefused for what cannot be."""

    streaming_share: float | None = None
    seed: int | None = None
    sink: int | None = None  # tokens, as are the next three
    recent: int | None = None
    prompt_recent: int | None = None
    budget: int | None = None
    threshold: float | None = None
    channels: int | None = None
    stride: int | None = None
    above: int | None = None
    dense_layers: int | None = None
    length: int | None = None
    sparsity: float | None = None
    keep: str | None = None  # window or all

    def __post_init__(self) -> None:
        for name, (low, high) in {
            "streaming_share": (0, 1),
            "sink": (0, 2**30),
            "recent": (1, 2**30),
            "prompt_recent": (1, 2**30),
            "budget": (1, 2**30),
            "threshold": (0, 1),
            "channels": (1, 512),
            "above": (0, 2**30),
            "dense_layers": (0, MOST_LAYERS),
            "length": (1, 2**30),
            "sparsity": (0, 1),
        }.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is not either
                raise ImportRefused(f"{flag(name)} is {value}; give a number from {low} to {high}.")
        if self.threshold == 0:
            raise ImportRefused("--threshold is 0, with which everything would be read; give more.")
        if self.keep not in (None, "window", "all"):
            raise ImportRefused(f"--keep is {self.keep!r}; write window or all.")

    def given(self) -> set[str]:
        """The names of what was said."""
        return {each.name for each in fields(self) if getattr(self, each.name) is not None}


def flag(name: str) -> str:
    """As the command line spells an option."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Source:
    """A foreign file, what it is for, and what it is to be called."""

    file: ForeignFile
    target: Target | None
    options: Options
    name: str  # of the policy; files beside it begin with it

    def model(self, why: str) -> Target:
        """The model; where none is known, one has to be given: `why` ends the sentence. Raises ImportRefused."""
        if self.target is None:
            raise ImportRefused(f"{self.file.name} {why}; give --model.")
        return self.target

    def fit(self, **said: int) -> None:
        """Refuse numbers (layers, kv_heads, query_heads, head_dim) that are not the model's."""
        for name, number in said.items():
            if self.target is not None and number != getattr(self.target, name):
                raise ImportRefused(
                    f"{self.file.name} is for a model with {name} {number}, but {self.target.name} has {name} "
                    f"{getattr(self.target, name)}; import a file that was made for this model."
                )

    def refuse(self, what: str) -> ImportRefused:
        """The exception for a file whose contents are wrong: `what` says where and how, and what to do."""
        return ImportRefused(f"{self.file.name} cannot be imported: {what}.")


@dataclass(frozen=True, slots=True)
class Tensors:
    """A safetensors file to be written beside the policy."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Imported:
    """What a foreign file says, in the words of a policy file."""

    heads: Heads
    approximations: tuple[str, ...]  # each says of how many heads
    query_heads: int | None = None
    head_dim: int | None = None
    beside: Mapping[str, Tensors] = field(default_factory=dict)  # by file name


@dataclass(frozen=True, slots=True)
class Format:
    """One foreign format."""

    name: str  # for --format
    what: str  # for people
    takes: frozenset[str]  # the options that mean something to it
    recognises: Callable[[ForeignFile], bool]
    made_for: Callable[[ForeignFile], str]  # the model's name as the file gives it, or something that begins with it
    read: Callable[[Source], Imported]


def file_stem(file: ForeignFile) -> str:
    """For formats that name their model in the file's name alone."""
    return file.path.stem


def groups_of(items: Sequence[Item], kv_heads: int) -> list[Sequence[Item]]:
    """What belongs to the query heads of each KV head."""
    ratio = len(items) // kv_heads
    return [items[head * ratio : (head + 1) * ratio] for head in range(kv_heads)]


def streaming_head(sink: int, recent: int, prompt_recent: int | None, *, window: bool) -> HeadEntry:
    """A head that reads the first `sink` tokens and the `recent` last ones (of prompts `prompt_recent`; None: as far as
    it keeps). With `window` it keeps no more, and gives the memory of the rest back; otherwise it keeps everything."""
    decode = SinkRecentBackend(backend="sink-recent", sink=sink, recent=recent)
    if not window and prompt_recent is None:
        return HeadEntry(prefill=DenseBackend(backend="dense"), decode=decode)
    reach = prompt_recent or recent
    prefill = SinkRecentBackend(backend="sink-recent", sink=sink, recent=reach)
    if not window:
        return HeadEntry(prefill=prefill, decode=decode)
    return HeadEntry(prefill=prefill, decode=decode, keep=KeepEntry(sink=sink, recent=max(reach, recent)))


def of_heads(count: int, total: int, what: str = "KV head") -> str:
    """ "3 of 256 KV heads", for approximations."""
    return f"{'all' if count == total else f'{count} of'} {total} {what}s"


def is_whole(value: Any) -> TypeGuard[int]:
    """An integer that is no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """An integer or float that is no truth value; infinities and NaN are none."""
    return is_whole(value) or (isinstance(value, float) and abs(value) < float("inf"))


def rectangular(rows: object, wanted: Callable[[Any], bool]) -> list[list[Any]] | None:
    """Lists of equal length, none empty, each item as wanted; None for anything else."""
    if not isinstance(rows, list):
        return None
    found = [list(row) if isinstance(row, (list, tuple)) else [] for row in rows]
    sizes = {len(row) for row in found}
    good = len(sizes) == 1 and sizes != {0} and len(found) <= MOST_LAYERS and len(found) * max(sizes) <= MOST_ITEMS
    return found if good and all(wanted(item) for row in found for item in row) else None
