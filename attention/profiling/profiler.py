"""Profiling from beginning to end: read, measure, choose, verify. docs/profiling.md says why in this order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy_file import Provenance
from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.candidates import Candidate, ladder
from gossamer.attention.profiling.choosing import Chooser, Trials
from gossamer.attention.profiling.cost import CostModel, Weights
from gossamer.attention.profiling.device import DeviceBench, Record
from gossamer.attention.profiling.device_times import DeviceProfile, Reads
from gossamer.attention.profiling.fidelity import Fidelity
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.gate_training import gates_against_pooled_keys, train_gates
from gossamer.attention.profiling.learning import calibrate, rank_channels, train_alphas
from gossamer.attention.profiling.options import Options
from gossamer.attention.profiling.profile import Point, Profile, Rival, Settings
from gossamer.attention.profiling.search import Search
from gossamer.attention.profiling.sensitivity import probed_again, sensitivities
from gossamer.attention.profiling.state import State
from gossamer.attention.profiling.stopwatch import Stopwatch
from gossamer.attention.profiling.subject import Progress, Subject
from gossamer.kernels.layout import PAGE_SIZE

PROBE = (64, 128)  # sink and recent tokens that a head is probed with
COMMAND = "command"  # in `about`: for the report alone, too long for the policy's note
Candidates = dict[Phase, tuple[Candidate, ...]]


@dataclass(slots=True)
class Profiler:
    """One profile on its way. Files that the policy names go into `folder`, their names beginning with `name`."""

    subject: Subject
    settings: Settings
    folder: Path
    name: str
    state: State
    progress: Progress
    device: DeviceProfile | None = None
    record: Record | None = None  # as in DeviceBench
    about: Mapping[str, str] = field(default_factory=dict)  # what stands beside every reported number
    stopwatch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.state)

    def run(self) -> Profile:
        """Raises ValueError for a length that is too short for the tasks."""
        subject, stopwatch = self.subject, self.stopwatch
        labels = f"{self.name}-labels.safetensors"
        with stopwatch.stage("label channels"):
            rank_channels(subject, self.settings, self.state, self.progress, self.folder / labels)
        gates = self._train_gates() if self.settings.train_gates else None
        candidates: Candidates = {phase: ladder(phase, labels=labels, gates=gates) for phase in PHASES}
        artefacts = Artefacts(self.folder, subject.shape.device)
        with stopwatch.stage("device profile"):
            device = self.device or self._measure_device(candidates, artefacts)
        found, looks = calibrate(subject, self.settings, candidates, artefacts, self.state, self.progress, stopwatch)
        costs = self._costs(device)
        costs = replace(costs, above=_above(candidates, found, costs))
        fidelity = Fidelity(subject.module, subject.shape, subject.dense(), subject.chunk)
        trials = Trials(
            subject,
            self.settings,
            fidelity,
            self.state,
            self.progress,
            artefacts,
            candidates,
            costs.above,
        )
        with stopwatch.stage("sensitivity of heads"):
            sensitivity = self._probe(candidates, found, trials)
        tables = self._tables(candidates, artefacts)

        def choosing_by(costs: CostModel) -> Chooser:
            search = Search(Options(candidates, found, sensitivity, costs, tables), subject.shape.free)
            return Chooser(search, replace(trials, above=costs.above), costs, found)

        chooser = choosing_by(costs)
        with stopwatch.stage("search"):
            plans = {bound.name: (bound, chooser.find(bound)) for bound in self.settings.bounds}
        with stopwatch.stage("verification"):
            points = chooser.verify(plans)
        with stopwatch.stage("comparison"):
            rivals = self._rivals(points, costs, choosing_by)
        alphas = self._train_heads() if self.settings.train_heads else None
        best = [*points[1:], points[0]]  # the first operating point of a file is its default
        provenance = Provenance(source="profiled", note=self._note(points[1:]))
        return Profile(
            file=trials.file({point.name: point.plan.heads for point in best}, self.name, provenance, _safer(points)),
            model=subject.entry,
            shape=subject.shape,
            settings=self.settings,
            weights=costs.weights,
            device=device,
            candidates=candidates,
            above=costs.above,
            found=found,
            looks=looks,
            sensitivity=sensitivity,
            attempts=tuple(chooser.attempts),
            points=tuple(points),
            rivals=tuple(rivals),
            alphas=alphas,
            gates=gates_against_pooled_keys(candidates, found, max(self.settings.lengths)),
            spent=stopwatch.spent,
            about=self.about,
        )

    def _rivals(
        self, points: Sequence[Point], costs: CostModel, choosing_by: Callable[[CostModel], Chooser]
    ) -> list[Rival]:
        """Uniform choices, compared with the first point that is not dense."""
        if not self.settings.compare or len(points) < 2:
            return []
        acting = _acting(costs.above, max(self.settings.lengths))
        return choosing_by(replace(costs, above=acting)).rivals(points[1])

    def _train_gates(self) -> str:
        name = f"{self.name}-gates.safetensors"
        with self.stopwatch.stage("gates"):
            train_gates(self.subject, self.settings, self.state, self.progress, self.folder / name)
        return name

    def _train_heads(self) -> Tensor:
        with self.stopwatch.stage("training of heads"):
            return train_alphas(self.subject, self.settings, self.state, self.progress)

    def _measure_device(self, candidates: Candidates, artefacts: Artefacts) -> DeviceProfile:
        def measure() -> DeviceProfile:
            lengths = sorted({4096, max(self.settings.lengths)} if max(self.settings.lengths) > 4096 else {2048, 4096})
            shape, chunk, say = self.subject.shape, self.subject.chunk, self.progress.say
            return DeviceBench(shape, artefacts, lengths, chunk, say, self.record).measure(candidates)

        return self.state.value("device", DeviceProfile, measure)

    def _costs(self, device: DeviceProfile) -> CostModel:
        shape = self.subject.shape
        element = torch.empty(0, dtype=shape.dtype).element_size()
        return CostModel(
            device,
            Weights.of(self.settings.goal, self.settings.memory),
            self.settings.lengths,
            shape.layers,
            shape.kv_heads,
            2 * PAGE_SIZE * shape.head_dim * element,
        )

    def _tables(self, candidates: Candidates, artefacts: Artefacts) -> dict[Phase, list[dict[str, int]]]:
        """Bytes of the page summaries that each candidate needs, per page and head."""
        shape = self.subject.shape
        element = torch.empty(0, dtype=shape.dtype).element_size()
        found: dict[Phase, list[dict[str, int]]] = {}
        for phase, own in candidates.items():
            found[phase] = []
            for each in own:
                needed = each.selector(shape.free[0], shape, artefacts).summaries
                sizes = {s.name: element * _product(s.shape(PAGE_SIZE, shape.head_dim)) for s in needed}
                found[phase].append(sizes)
        return found

    def _probe(
        self, candidates: Candidates, found: Mapping[Phase, Mapping[int, Found]], trials: Trials
    ) -> dict[Phase, Tensor]:
        shape = self.subject.shape
        shortest, longest = min(self.settings.lengths), max(self.settings.lengths)
        probe = {
            phase: next(n for n, each in enumerate(own) if each.window == PROBE) for phase, own in candidates.items()
        }
        near, far = ({phase: found[phase][length] for phase in PHASES} for length in (shortest, longest))
        sizes = shape.layers, shape.kv_heads
        known = sensitivities(partial(trials.probe, shortest), sizes, shape.free, probe, near)
        return probed_again(known, partial(trials.probe, longest), probe, near, far)

    def _note(self, points: Sequence[Point]) -> str:
        lengths = ", ".join(map(str, self.settings.lengths))
        held = "; ".join(
            f"{point.name}: {point.unseen.divergence():.4f} nats from dense on unseen documents" for point in points
        )
        about = ", ".join(f"{key} {value}" for key, value in self.about.items() if key != COMMAND)
        return f"at {lengths} tokens, seed {self.settings.seed}; {held}; {about}."


def _above(
    candidates: Candidates, found: Mapping[Phase, Mapping[int, Found]], costs: CostModel
) -> dict[Phase, dict[str, int]]:
    """By kind, the length from which it is worth choosing at all, for the candidate that reads least."""
    answer: dict[Phase, dict[str, int]] = {}
    for phase, own in candidates.items():
        answer[phase] = {}
        for kind in dict.fromkeys(each.kind for each in own):
            numbers = [n for n, each in enumerate(own) if each.kind == kind]
            reads = {
                length: Reads(*(min(float(part[n].mean()) for n in numbers) for part in (table.density, table.singles)))
                for length, table in found[phase].items()
            }
            if kind not in ("dense", "sink-recent"):
                answer[phase][kind] = costs.worth_it_above(phase, kind, reads)
    return answer


def _acting(above: Mapping[Phase, Mapping[str, int]], length: int) -> dict[Phase, dict[str, int]]:
    """The same, but kinds that are not worth it at this length choose all the same, wherever they are."""
    return {phase: {kind: least * (least < length) for kind, least in own.items()} for phase, own in above.items()}


def _safer(points: Sequence[Point]) -> dict[str, str]:
    """For each point the next dearer one."""
    order = sorted(points, key=lambda point: point.plan.cost)
    return {point.name: dearer.name for point, dearer in pairwise(order)}


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
