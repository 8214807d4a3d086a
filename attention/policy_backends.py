"""What a policy file may say of a head: its backends, and what it keeps. The classes are part of the file's schema."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy import HeadPolicy
from gossamer.attention.selectors import (
    BlockSparse,
    Budget,
    Dense,
    DoubleSparsity,
    LearnedGate,
    Selector,
    SinkRecent,
    VerticalSlash,
)
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent, Retention

Tokens = Annotated[int, Field(ge=1, le=2**30)]
Share = Annotated[float, Field(gt=0.0, le=1.0, strict=False)]
File = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]  # beside the policy file
Above = Annotated[int, Field(ge=0, le=2**30)]


class Strict(BaseModel):
    """No unknown names, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Which selector of the model a backend becomes, and where its files are."""

    layer: int
    kv_heads: int
    head_dim: int | None
    phase: Literal["prefill", "decode"]
    artefacts: Artefacts


class DenseBackend(Strict):
    """Reads everything."""

    backend: Literal["dense"]

    def selector(self, place: Place) -> Selector:
        return Dense()


class SinkRecentBackend(Strict):
    """Reads the first `sink` tokens and the last `recent`, rounded up to pages."""

    backend: Literal["sink-recent"]
    sink: int = Field(ge=0, le=2**30)
    recent: Tokens

    def selector(self, place: Place) -> Selector:
        return SinkRecent(self.sink, self.recent)


class BudgetEntry(Strict):
    """How much is read, in one of five ways: a count of `tokens`, a `share` of what the query block may see, the pages
    that hold a `mass` of the estimated weight, those that score a `part` of the best page's weight, or those of at
    least some `weight`. With `mass`, `part` or `weight`, `least` tokens at any rate. The `recent` tokens before the
    block are always read, and belong to the count or share."""

    tokens: Tokens | None = None
    share: Share | None = None
    mass: Share | None = None
    part: Share | None = None
    weight: Share | None = None
    least: int = Field(default=0, ge=0, le=2**30)
    recent: int = Field(default=0, ge=0, le=2**30)

    @model_validator(mode="after")
    def _one(self) -> "BudgetEntry":
        given = [name for name in ("tokens", "share", "mass", "part", "weight") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("a budget is one of tokens, share, mass, part and weight")
        if self.least and given[0] in ("tokens", "share"):
            raise ValueError(f"least goes with mass, part or weight, not with {given[0]}")
        return self

    def budget(self) -> Budget:
        if self.tokens is not None:
            return Budget("tokens", self.tokens, recent=self.recent)
        if self.share is not None:
            return Budget("share", self.share, recent=self.recent)
        if self.mass is not None:
            return Budget("mass", self.mass, self.least, self.recent)
        if self.part is not None:
            return Budget("part", self.part, self.least, self.recent)
        assert self.weight is not None
        return Budget("weight", self.weight, self.least, self.recent)


class BlockSparseBackend(Strict):
    """Reads the pages that the budget admits by their `score`: against mean keys, against bounds of the keys, or by
    antidiagonal sums of every `stride`-th product."""

    backend: Literal["block-sparse"]
    score: Literal["mean", "bounds", "antidiagonal"] = "mean"
    stride: Literal[4, 8, 16, 32] | None = None  # 16 for antidiagonals
    budget: BudgetEntry
    above: Above = 0
    correct_dropped: bool = False

    @model_validator(mode="after")
    def _stride_of_antidiagonals(self) -> "BlockSparseBackend":
        if self.stride is not None and self.score != "antidiagonal":
            raise ValueError(f"stride goes with the score antidiagonal, not with {self.score}")
        return self

    def selector(self, place: Place) -> Selector:
        return BlockSparse(self.budget.budget(), self.score, self.stride or 16, self.above, self.correct_dropped)


class VerticalSlashBackend(Strict):
    """Reads the `columns` tokens and `diagonals` distances that the last `probe` queries of a chunk attend to most;
    with a `mass` below 1, as many of them as hold it. For prompts."""

    backend: Literal["vertical-slash"]
    columns: int = Field(ge=0, le=2**30)
    diagonals: int = Field(ge=0, le=2**30)
    probe: int = Field(default=64, ge=1, le=1024)
    mass: Share = 1.0
    above: Above = 0

    def selector(self, place: Place) -> Selector:
        if place.phase == "decode":
            raise ValueError(
                "vertical-slash finds its columns with the last queries of a prompt; for generated tokens choose "
                "double-sparsity, block-sparse, sink-recent or dense"
            )
        return VerticalSlash(self.columns, self.diagonals, self.probe, self.mass, self.above)


class DoubleSparsityBackend(Strict):
    """Reads the `tokens` keys with the largest products over the best `channels` that `file` names for the head; with a
    `mass` below 1, as many of them as hold it. For generated tokens."""

    backend: Literal["double-sparsity"]
    file: File
    channels: int = Field(default=16, ge=1, le=512)
    tokens: Tokens
    mass: Share = 1.0
    above: Above = 0

    def selector(self, place: Place) -> Selector:
        if place.phase == "prefill":
            raise ValueError(
                "double-sparsity chooses single tokens for one query at a time; for prompts choose block-sparse, "
                "vertical-slash, learned-gate, sink-recent or dense"
            )
        labels = place.artefacts.labels(self.file, place.layer, self.channels, place.kv_heads, place.head_dim)
        return DoubleSparsity(labels, self.tokens, self.mass, self.above)


class LearnedGateBackend(Strict):
    """Reads the pages that the budget admits by the softmax weight that the trained gate in `file` gives them."""

    backend: Literal["learned-gate"]
    file: File
    budget: BudgetEntry
    above: Above = 0
    correct_dropped: bool = False

    def selector(self, place: Place) -> Selector:
        gate = place.artefacts.gate(self.file, place.layer, place.phase, place.kv_heads, place.head_dim)
        return LearnedGate(
            gate.keys, self.budget.budget(), gate.query, gate.norm, place.phase, self.above, self.correct_dropped
        )


Backend = Annotated[
    DenseBackend
    | SinkRecentBackend
    | BlockSparseBackend
    | VerticalSlashBackend
    | DoubleSparsityBackend
    | LearnedGateBackend,
    Field(discriminator="backend"),
]


class KeepEntry(Strict):
    """Tokens that stay in memory: the first `sink` and the last `recent`."""

    sink: int = Field(ge=0, le=2**30)
    recent: Tokens


class HeadEntry(Strict):
    """What some heads do. A head with `keep` is a streaming head: the tokens in between give their memory back."""

    prefill: Backend = DenseBackend(backend="dense")
    decode: Backend = DenseBackend(backend="dense")
    keep: Literal["all"] | KeepEntry = "all"

    @field_validator("prefill", "decode", mode="before", json_schema_input_type=Backend | Literal["dense"])
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"backend": value} if isinstance(value, str) else value

    def head_policy(self, layer: int, kv_heads: int, head_dim: int | None, artefacts: Artefacts) -> HeadPolicy:
        """For the heads of one layer. Raises ValueError or ArtefactError, part of or one sentence."""
        keep: Retention = KeepAll() if self.keep == "all" else KeepSinkRecent(self.keep.sink, self.keep.recent)
        return HeadPolicy(
            self.prefill.selector(Place(layer, kv_heads, head_dim, "prefill", artefacts)),
            self.decode.selector(Place(layer, kv_heads, head_dim, "decode", artefacts)),
            keep,
        )
