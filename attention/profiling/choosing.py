"""From what was measured to operating points that hold their bounds: a budget is bisected, every plan is tried."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.policy_file import PolicyFile, Provenance
from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.cost import CostModel
from gossamer.attention.profiling.fidelity import Fidelity, Trial, least_divergence, losses, together, within
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.options import DENSE, Assignment, Choice
from gossamer.attention.profiling.profile import Attempt, Bound, Point, Rival, Settings
from gossamer.attention.profiling.prompts import TEXT, Document
from gossamer.attention.profiling.search import Plan, Search
from gossamer.attention.profiling.state import State
from gossamer.attention.profiling.subject import CALIBRATED, SEARCHED, UNSEEN, Progress, Subject
from gossamer.attention.profiling.writing import policy_file

PROBED, QUESTIONS = ("multikey", TEXT), 2  # the documents that heads are probed with, and how often each is asked
WIDE, ROUNDS = 64.0, 7  # of the search for a budget: how far below the bound it begins, and bisections
EXACT = "exact"


@dataclass(slots=True)
class Trials:
    """Runs assignments on documents; what was run once is known."""

    subject: Subject
    settings: Settings
    fidelity: Fidelity
    state: State
    progress: Progress
    artefacts: Artefacts
    candidates: Mapping[Phase, Sequence[Candidate]]
    above: Mapping[Phase, Mapping[str, int]] = field(default_factory=lambda: {"prefill": {}, "decode": {}})
    _documents: dict[tuple[int, int], list[Document]] = field(default_factory=dict)

    def beside_dense(self, heads: Assignment, length: int, most: float, what: str) -> tuple[Trial, Trial]:
        """On the documents of the search, until it is sure to diverge by more than `most` nats; and dense attention on
        as many of them."""
        documents, purpose = self._of(SEARCHED, length), f"{SEARCHED}-{length}"
        own = self._parts(heads, documents, purpose, f"{what}, {length} tokens", most)
        dense = self._parts(self.all_dense, documents[: len(own)], purpose, f"dense attention, {length} tokens")
        return together(own), together(dense)

    def run_all(self, heads: Assignment, purpose: int, what: str) -> Trial:
        """On all documents of a purpose, at all lengths."""
        parts: list[Trial] = []
        for length in self.settings.lengths:
            documents = self._of(purpose, length)
            parts += self._parts(heads, documents, f"{purpose}-{length}", f"{what}, {length} tokens")
        return together(parts)

    def probe(self, length: int, assignments: Sequence[Assignment], phase: Phase) -> list[float]:
        """Nats from dense of each assignment, which is dense in the other phase, on a part of the calibration's
        documents of one length."""
        few = self._few(length)
        where = "" if length == min(self.settings.lengths) else f"-{length}"
        if phase == "prefill":
            self.progress.begin(f"sensitivity of heads in prompts, {length} tokens", len(assignments))
            found = []
            for heads in assignments:
                found.append(together(self._parts(heads, few, f"probe{where}", "")).divergence())
                self.progress.tick()
            return found

        def run() -> list[Trial]:
            self.progress.begin(f"sensitivity of heads in decoding, {length} tokens", len(few))
            return self.fidelity.try_decodes([self._policy(each) for each in assignments], few, self.progress.tick)

        return [each.divergence() for each in self.state.value(f"probe-decode{where}", list[Trial], run)]

    def run_decodes(self, heads: Sequence[Assignment], purpose: int, what: str) -> list[Trial]:
        """As `run_all`, for assignments that are alike for prompts and keep everything."""
        policies = [self._policy(each) for each in heads]
        name = hashlib.sha256(" ".join(each.points[0].fingerprint() for each in policies).encode()).hexdigest()[:8]
        found = []
        for length in self.settings.lengths:
            documents = self._of(purpose, length)

            def run(documents: Sequence[Document] = documents, length: int = length) -> list[Trial]:
                self.progress.begin(f"{what}, {length} tokens", len(documents))
                return self.fidelity.try_decodes(policies, documents, self.progress.tick)

            found.append(self.state.value(f"decodes-{purpose}-{length}-{name}", list[Trial], run))
        return [together(own) for own in zip(*found, strict=True)]

    def _of(self, purpose: int, length: int) -> list[Document]:
        if (purpose, length) not in self._documents:
            self._documents[purpose, length] = self.subject.documents(self.settings, length, purpose)
        return self._documents[purpose, length]

    def _few(self, length: int) -> list[Document]:
        documents = self.subject.documents(self.settings, length, CALIBRATED)
        few = [d for d in documents[: len(documents) // self.settings.documents] if d.task in PROBED]
        return [Document(d.task, d.length, d.seed, d.split, d.exchanges[:QUESTIONS]) for d in few]

    @property
    def all_dense(self) -> Assignment:
        shape = self.subject.shape
        return ((DENSE,) * shape.kv_heads,) * shape.layers

    def _parts(
        self, heads: Assignment, documents: Sequence[Document], purpose: str, what: str, most: float = inf
    ) -> list[Trial]:
        """One for each document, and none for further ones once it is sure that all together diverge by more than
        `most` nats."""
        policy = self._policy(heads)
        name = f"trial-{purpose}-{policy.points[0].fingerprint()}"
        parts = self.state.value(name, list[Trial], list[Trial])
        if what and len(parts) < len(documents):
            self.progress.begin(what, len(documents) - len(parts))
        for document in documents[len(parts) :]:
            if least_divergence(parts, documents) > most:
                break
            parts.append(self.fidelity.try_point(policy, [document], self.progress.tick if what else _nothing))
            self.state.keep(name, list[Trial], parts)
        return parts[: len(documents)]

    def file(
        self,
        points: Mapping[str, Assignment],
        name: str,
        provenance: Provenance,
        safer: Mapping[str, str] = MappingProxyType({}),
    ) -> PolicyFile:
        """safer: by point, the one to use where it loses too much."""
        return policy_file(name, self.subject.entry, provenance, points, self.candidates, self.above, safer)

    def _policy(self, heads: Assignment) -> AttentionPolicy:
        file = self.file({"tried": heads}, "tried", Provenance(source="profiled"))
        return file.policy(self.artefacts)


def _nothing() -> None: ...


@dataclass(slots=True)
class Chooser:
    """Finds a plan for each bound, and says how it does where nothing was chosen."""

    search: Search
    trials: Trials
    costs: CostModel
    found: Mapping[Phase, Mapping[int, Found]]
    attempts: list[Attempt] = field(default_factory=list)

    def find(self, bound: Bound) -> Plan:
        """The cheapest plan that holds the bound of those tried while the budget of predicted divergence is bisected,
        and of those that held a tighter bound before; dense where none does."""
        low, high = max([bound.divergence / WIDE, *(each.budget for each in self._known(bound))]), self.search.most
        if not self._holds(bound, high):
            for _ in range(ROUNDS):
                middle = (low * high) ** 0.5
                if self._holds(bound, middle):
                    low = middle
                else:
                    high = middle
        plans = [self.search.judged(self.trials.all_dense), *(each.plan for each in self._known(bound))]
        return min(plans, key=lambda plan: (plan.cost, plan.divergence))

    def _known(self, bound: Bound) -> list[Attempt]:
        """That hold it, or one that is no wider."""
        points = {
            each.name
            for each in self.trials.settings.bounds
            if each.points <= bound.points and each.divergence <= bound.divergence
        }
        return [each for each in self.attempts if each.held and each.point in points]

    def _holds(self, bound: Bound, budget: float) -> bool:
        """Whether the plan of this budget holds; every attempt is kept."""
        plan = self.search.plan(budget)
        known = next(
            (each for each in self.attempts if each.point == bound.name and each.plan.heads == plan.heads), None
        )
        if known is not None:
            return known.held
        lost = diverged = 0.0  # the most of any length
        held = True
        for length in self.trials.settings.lengths:
            what = f"{bound.name}: a plan at {100 * plan.cost:.0f}% of dense cost"
            trial, dense = self.trials.beside_dense(plan.heads, length, bound.divergence, what)
            lost = max([lost, *losses(dense, trial).values()])
            diverged = max(diverged, trial.divergence())
            held = held and within(dense, trial, bound.points) and diverged <= bound.divergence
            if not held:  # longer documents take longer, and cannot mend it
                break
        self.attempts.append(Attempt(bound.name, budget, plan, diverged, lost, held))
        self.trials.progress.say(
            f"{bound.name}: cost {100 * plan.cost:.1f}% of dense, {diverged:.4f} nats from it, "
            f"{lost:.1f} points lost at most: {'holds' if held else 'too much'}"
        )
        return held

    def verify(self, plans: Mapping[str, tuple[Bound, Plan]]) -> list[Point]:
        """Dense and all plans, on documents that nothing was chosen by."""
        dense = self.search.judged(self.trials.all_dense)
        points = [self._point(EXACT, None, dense)]
        return points + [self._point(name, bound, plan) for name, (bound, plan) in plans.items()]

    def _point(self, name: str, bound: Bound | None, plan: Plan) -> Point:
        lengths = self.trials.settings.lengths
        return Point(
            name,
            bound,
            plan,
            self.trials.run_all(plan.heads, SEARCHED, name),
            self.trials.run_all(plan.heads, UNSEEN, f"{name} on unseen documents"),
            {phase: {n: self.search.density(plan, phase, n) for n in lengths} for phase in PHASES},
            {length: self.search.memory(plan, length) for length in lengths},
        )

    def rivals(self, point: Point) -> list[Rival]:
        """For each phase and kind of candidate the uniform choice that reads about as much as the point does."""
        found = []
        for phase in PHASES:
            candidates, density = self.trials.candidates[phase], self._densities(phase)
            wanted = point.density[phase][max(self.trials.settings.lengths)]
            numbers = []
            for kind in dict.fromkeys(each.kind for each in candidates if each.kind != "dense"):
                own = [n for n, each in enumerate(candidates) if each.kind == kind]
                enough = [n for n in own if density[n] >= wanted] or [max(own, key=density.__getitem__)]
                numbers.append(min(enough, key=density.__getitem__))
            plans = [self.search.judged(self._everywhere(point.plan, phase, number)) for number in numbers]
            names = [candidates[number].text for number in numbers]
            for number, name, plan, trial in zip(numbers, names, plans, self._tried(phase, plans, names), strict=True):
                found.append(Rival(name, phase, plan, density[number], trial))
        return found

    def _densities(self, phase: Phase) -> list[float]:
        """Of every candidate at the longest length, mean over heads."""
        table = self.found[phase][max(self.trials.settings.lengths)].density
        return [float(own.mean()) for own in table]

    def _tried(self, phase: Phase, plans: Sequence[Plan], names: Sequence[str]) -> list[Trial]:
        """Uniform choices in one phase, on unseen documents."""
        if phase == "decode":
            what = f"decode: {len(plans)} backends for every head"
            return self.trials.run_decodes([plan.heads for plan in plans], UNSEEN, what)
        return [
            self.trials.run_all(plan.heads, UNSEEN, f"prefill: {name} for every head")
            for plan, name in zip(plans, names, strict=True)
        ]

    def _everywhere(self, plan: Plan, phase: Phase, number: int) -> Assignment:
        def own(choice: Choice) -> Choice:
            prefill, decode = (number, choice.decode) if phase == "prefill" else (choice.prefill, number)
            return Choice(prefill, decode, False)

        free = self.trials.subject.shape.free
        return tuple(
            tuple(own(choice) for choice in row) if layer in free else row for layer, row in enumerate(plan.heads)
        )
