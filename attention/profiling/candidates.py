"""What a head may be given: for each phase a ladder of parameters for every backend, from generous to small."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy_backends import (
    Backend,
    BlockSparseBackend,
    DenseBackend,
    DoubleSparsityBackend,
    LearnedGateBackend,
    Place,
    SinkRecentBackend,
)
from gossamer.attention.policy_view import Phase, in_words
from gossamer.attention.profiling.reading import Shape
from gossamer.attention.selectors import Selector

SINK = 64
RECENT = 128  # tokens before a query block that page-level backends always read
WINDOWS = (64, 128, 256, 512, 1024, 2048, 4096)
SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03125)
MASSES = (0.98, 0.95, 0.9, 0.8)
PARTS = (0.02, 0.05, 0.1, 0.2)
TOKENS = (256, 512, 1024, 2048, 4096, 8192)
FEW_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
SIZES = ((128, 4), (512, 8), (1024, 16), (2048, 64), (4096, 128))  # columns and diagonals
STRIDE = 8

_BACKEND: TypeAdapter[Backend] = TypeAdapter(Backend)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend for one phase. Sink-recent candidates are judged to the token, as streaming heads are."""

    phase: Phase
    backend: Backend

    @property
    def text(self) -> str:
        return in_words(self.backend)

    @property
    def window(self) -> tuple[int, int] | None:
        """Sink and recent tokens of a candidate that a head could stream with."""
        return (self.backend.sink, self.backend.recent) if isinstance(self.backend, SinkRecentBackend) else None

    @property
    def kind(self) -> str:
        """Candidates of one kind choose in the same way and differ in how much."""
        if isinstance(self.backend, BlockSparseBackend):
            fixed = f"block-sparse {self.backend.score}"
            corrected = ", corrected" if self.backend.correct_dropped else ""
            return f"{fixed}{corrected} by {budget_kind(self.backend)}"
        if isinstance(self.backend, LearnedGateBackend):
            return f"learned-gate by {budget_kind(self.backend)}"
        return self.backend.backend

    def selector(self, layer: int, shape: Shape, artefacts: Artefacts) -> Selector:
        """For the heads of one layer."""
        place = Place(layer, shape.kv_heads, shape.head_dim, self.phase, artefacts)
        return self.backend.selector(place)


def budget_kind(backend: BlockSparseBackend | LearnedGateBackend) -> str:
    return next(name for name in ("tokens", "share", "mass", "part", "weight") if getattr(backend.budget, name))


def ladder(phase: Phase, *, labels: str | None, gates: str | None) -> tuple[Candidate, ...]:
    """Every candidate of a phase, dense first. labels, gates: files that the backends which need them will name."""
    given: list[dict[str, object]] = [{"backend": "dense"}]
    given += [{"backend": "sink-recent", "sink": SINK, "recent": recent} for recent in WINDOWS]
    if phase == "prefill":
        given += _block_sparse("mean", share=SHARES, mass=MASSES, part=PARTS)
        given += _block_sparse("mean", correct_dropped=True, share=SHARES, mass=MASSES)
        given += _block_sparse("antidiagonal", stride=STRIDE, share=SHARES[1:], mass=MASSES)
        given += [{"backend": "vertical-slash", "columns": c, "diagonals": d} for c, d in SIZES]
    else:
        given += _block_sparse("bounds", tokens=TOKENS, share=SHARES[1:])
        given += _block_sparse("mean", tokens=TOKENS, mass=MASSES)
        given += _block_sparse("mean", correct_dropped=True, tokens=TOKENS)
    if gates is not None:
        own: dict[str, Sequence[float]] = {"share": SHARES[1:]} if phase == "prefill" else {"tokens": TOKENS}
        given += [{"backend": "learned-gate", "file": gates, "budget": budget} for budget in _budgets(own)]
    if labels is not None and phase == "decode":
        given += [{"backend": "double-sparsity", "file": labels, "tokens": tokens} for tokens in FEW_TOKENS]
    return tuple(Candidate(phase, _BACKEND.validate_python(each)) for each in given)


def _block_sparse(
    score: str, *, stride: int | None = None, correct_dropped: bool = False, **budgets: Sequence[float]
) -> list[dict[str, object]]:
    more: dict[str, object] = {"stride": stride} if stride else {}
    more |= {"correct_dropped": True} if correct_dropped else {}
    return [{"backend": "block-sparse", "score": score, **more, "budget": budget} for budget in _budgets(budgets)]


def _budgets(values: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [{name: value, "recent": RECENT} for name, ladder in values.items() for value in ladder]


def reads_everything(candidate: Candidate) -> bool:
    return isinstance(candidate.backend, DenseBackend)


def needs_files(candidate: Candidate) -> bool:
    return isinstance(candidate.backend, LearnedGateBackend | DoubleSparsityBackend)
