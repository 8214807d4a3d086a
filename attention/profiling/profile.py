"""What a profile is: everything that was asked, measured and chosen, as the report shows it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gossamer.attention.policy_file import ModelEntry, PolicyFile
from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.cost import Goal, Weights
from gossamer.attention.profiling.device_times import DeviceProfile
from gossamer.attention.profiling.fidelity import Trial
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.reading import Shape
from gossamer.attention.profiling.search import Plan
from gossamer.attention.profiling.statistics import Looks


@dataclass(frozen=True, slots=True)
class Bound:
    """How far an operating point may be from dense: points of accuracy that any task may lose at any length, and nats
    that next-token distributions may diverge by."""

    name: str
    points: float
    divergence: float


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for. documents: of each task, at each length, to calibrate with and to search with; questions:
    about each of them, at most."""

    lengths: tuple[int, ...]
    documents: int
    questions: int
    seed: int
    goal: Goal
    memory: float | None
    bounds: tuple[Bound, ...]
    compare: bool
    train_gates: bool
    train_heads: bool


@dataclass(frozen=True, slots=True)
class Attempt:
    """A plan that was tried on the way to an operating point."""

    point: str
    budget: float  # nats that it was allowed, as predicted
    plan: Plan
    divergence: float  # as measured, on as many documents as it took to see whether it holds
    lost: float  # points, of the task and length that lost most
    held: bool  # its bounds


@dataclass(frozen=True, slots=True)
class Point:
    """An operating point: its plan, and how it does on documents that nothing was chosen by. memory: bytes of keys,
    values and summaries as a share of dense, by length."""

    name: str
    bound: Bound | None  # None: dense
    plan: Plan
    searched: Trial
    unseen: Trial
    density: Mapping[Phase, Mapping[int, float]]  # as calibration found it
    memory: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Rival:
    """The same candidate for every head in one phase, at a density as near to the point's as the ladder allows, and the
    point's own choices in the other phase."""

    name: str
    phase: Phase
    plan: Plan
    density: float
    unseen: Trial


@dataclass(frozen=True, slots=True)
class GateRecall:
    """Share of dense attention's mass that is found under the same budgets, mean over these: by the trained gate, and
    by mean keys of pages; [layers, G] each."""

    gate: Tensor
    pooled: Tensor


@dataclass(frozen=True, slots=True)
class Spent:
    """What one stage of profiling took."""

    stage: str
    seconds: float
    memory: int  # bytes, the most that the process or the GPU held by then


@dataclass(frozen=True, slots=True)
class Profile:
    """A finished profile."""

    file: PolicyFile
    model: ModelEntry
    shape: Shape
    settings: Settings
    weights: Weights
    device: DeviceProfile
    candidates: Mapping[Phase, tuple[Candidate, ...]]
    above: Mapping[Phase, Mapping[str, int]]  # by kind of candidate, the length up to which it leaves a head dense
    found: Mapping[Phase, Mapping[int, Found]]  # by length
    looks: Mapping[int, Looks]  # by length
    sensitivity: Mapping[Phase, Tensor]  # [layers, G]
    attempts: tuple[Attempt, ...]
    points: tuple[Point, ...]  # dense first
    rivals: tuple[Rival, ...]  # of the first point that is not dense
    alphas: Tensor | None  # [layers, G], of DuoAttention, when they were trained
    gates: Mapping[Phase, GateRecall] | None  # None: not trained
    spent: tuple[Spent, ...]
    about: Mapping[str, str]  # versions, commit, data, date
