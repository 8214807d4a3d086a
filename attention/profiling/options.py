"""What a head can be given, and what that costs and loses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.cost import CostModel
from gossamer.attention.profiling.findings import Found

Sensitivity = Mapping[Phase, Tensor]  # [layers, G]: nats per squared relative error


@dataclass(frozen=True, slots=True)
class Choice:
    """One head's candidates, by number, and whether it streams: then both are sink-recent with one window."""

    prefill: int
    decode: int
    streams: bool

    def of(self, phase: Phase) -> int:
        return self.prefill if phase == "prefill" else self.decode

    def moved(self, phase: Phase, number: int) -> "Choice":
        """With another candidate in one phase, and everything kept."""
        return Choice(number, self.decode, False) if phase == "prefill" else Choice(self.prefill, number, False)


DENSE = Choice(0, 0, False)  # a ladder begins with dense
Assignment = tuple[tuple[Choice, ...], ...]  # [layer][KV head]


@dataclass(frozen=True, slots=True)
class Option:
    """A choice with what it costs, calls left out, and how far it is predicted to lead from dense, in nats."""

    choice: Choice
    cost: float
    divergence: float


@dataclass(frozen=True, slots=True)
class _Part:
    """One phase's share of an option. shared: what it costs with a part of its call, were that shared by all heads of
    the layer. tables: page summaries by name, in bytes per page."""

    number: int
    cost: float
    shared: float
    divergence: float
    tables: tuple[tuple[str, int], ...]


class Options:
    """Every head's options. found: by phase and length. tables: for each candidate the page summaries that it needs, by
    name, in bytes per page and head."""

    def __init__(
        self,
        candidates: Mapping[Phase, Sequence[Candidate]],
        found: Mapping[Phase, Mapping[int, Found]],
        sensitivity: Sensitivity,
        costs: CostModel,
        tables: Mapping[Phase, Sequence[Mapping[str, int]]],
    ) -> None:
        self.found, self.costs = found, costs
        self._candidates, self._sensitivity = candidates, sensitivity
        self._tables = {phase: [tuple(each.items()) for each in own] for phase, own in tables.items()}
        self._known: dict[tuple[Phase, int, int], list[_Part]] = {}
        self._made: dict[tuple[Choice, int, int], Option] = {}

    def option(self, choice: Choice, layer: int, head: int) -> Option:
        known = self._made.get((choice, layer, head))
        if known is None:
            parts = {phase: self._parts(phase, layer, head) for phase in PHASES}
            known = self._made[choice, layer, head] = self._join(choice, parts)
        return known

    def window(self, choice: Choice) -> tuple[int, int] | None:
        """Sink and recent tokens that the head keeps; None for all."""
        return self._candidates["prefill"][choice.prefill].window if choice.streams else None

    def kind(self, choice: Choice, phase: Phase) -> str:
        return self._candidates[phase][choice.of(phase)].kind

    def summary_bytes(self, choice: Choice) -> int:
        """Per page."""
        return sum(dict([*self._tables["prefill"][choice.prefill], *self._tables["decode"][choice.decode]]).values())

    @property
    def streaming(self) -> list[Choice]:
        windows = {c.window: n for n, c in enumerate(self._candidates["decode"]) if c.window is not None}
        return [
            Choice(n, windows[c.window], True)
            for n, c in enumerate(self._candidates["prefill"])
            if c.window is not None and c.window in windows
        ]

    def frontier(self, layer: int, head: int) -> list[Option]:
        """What no other option of the head alone beats in both, from dense on: falling cost, rising divergence."""
        parts = {phase: self._parts(phase, layer, head) for phase in PHASES}
        choices = [Choice(p, d, False) for p in _unbeaten(parts["prefill"]) for d in _unbeaten(parts["decode"])]
        # of two that are alike the first is kept: streaming gives memory back for nothing
        pairs = [(self._join(choice, parts), self._shared(choice, parts)) for choice in [*self.streaming, *choices]]
        pairs.sort(key=lambda pair: (pair[0].divergence, pair[1]))
        kept, least = [self._join(DENSE, parts)], self._shared(DENSE, parts)
        for option, cost in pairs:
            if cost < least:
                kept.append(option)
                least = cost
        return kept

    def _parts(self, phase: Phase, layer: int, head: int) -> list[_Part]:
        """Per candidate."""
        if (phase, layer, head) in self._known:
            return self._known[phase, layer, head]
        own, weight = self.found[phase], float(self._sensitivity[phase][layer, head])
        parts = []
        for number, candidate in enumerate(self._candidates[phase]):
            reads = {length: own[length].reads(number, layer, head) for length in self.costs.lengths}
            acting = [length for length in reads if self.costs.acts(phase, candidate.kind, length)]
            worst = max((float(own[length].error[number, layer, head]) for length in acting), default=0.0)
            cost = self.costs.of_phase(phase, candidate.kind, reads)
            shared = cost + self.costs.of_calls(phase, [[candidate.kind]]) / self.costs.kv_heads
            parts.append(_Part(number, cost, shared, weight * worst, self._tables[phase][number]))
        return self._known.setdefault((phase, layer, head), parts)

    def _join(self, choice: Choice, parts: Mapping[Phase, Sequence[_Part]]) -> Option:
        prefill, decode = parts["prefill"][choice.prefill], parts["decode"][choice.decode]
        memory = self.costs.of_memory(self.summary_bytes(choice), self.window(choice))
        return Option(choice, prefill.cost + decode.cost + memory, prefill.divergence + decode.divergence)

    def _shared(self, choice: Choice, parts: Mapping[Phase, Sequence[_Part]]) -> float:
        memory = self.costs.of_memory(self.summary_bytes(choice), self.window(choice))
        return parts["prefill"][choice.prefill].shared + parts["decode"][choice.decode].shared + memory


def _unbeaten(parts: Sequence[_Part]) -> list[int]:
    """The candidates that no other beats in cost, divergence and memory alike."""

    def beaten(one: _Part) -> bool:
        return any(
            other.shared <= one.shared
            and other.divergence <= one.divergence
            and set(other.tables) <= set(one.tables)
            and (other.shared < one.shared or other.divergence < one.divergence)
            for other in parts
        )

    return [one.number for one in parts if not beaten(one)]
