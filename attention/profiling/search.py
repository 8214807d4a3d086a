"""Which candidate each head gets: least cost under a bound on the whole model's predicted divergence from dense.

The predicted divergence of a choice is the sum over heads of sensitivity x squared relative error (a Gauss-Newton view:
near dense, the divergence of next-token distributions is quadratic in what attention gets wrong). Cost and divergence
both add up over heads, so for a price of divergence each head's best choice can be found alone (Lagrange); the price is
bisected until the bound is met, and what slack is left is spent greedily. What does not add up, that a selector is
called once for all heads of a layer that share it, is looked at last. docs/profiling.md has the formulas.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from torch import Tensor

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.cost import CostModel
from gossamer.attention.profiling.findings import Found

ROUNDS = 60  # of bisecting the price
Sensitivity = Mapping[Phase, Tensor]  # [layers, G]: nats per squared relative error


@dataclass(frozen=True, slots=True)
class Choice:
    """One head's candidates, by number, and whether it streams: then both are sink-recent with one window."""

    prefill: int
    decode: int
    streams: bool


@dataclass(frozen=True, slots=True)
class Option:
    """A choice with what it costs and how far it is predicted to lead from dense, in nats."""

    choice: Choice
    cost: float
    divergence: float


DENSE = Choice(0, 0, False)  # a ladder begins with dense


@dataclass(frozen=True, slots=True)
class _Part:
    """One phase's share of an option. tables: page summaries by name, in bytes per page."""

    number: int
    cost: float
    divergence: float
    tables: tuple[tuple[str, int], ...]


Assignment = tuple[tuple[Choice, ...], ...]  # [layer][KV head]


@dataclass(frozen=True, slots=True)
class Plan:
    """Choices for all heads."""

    heads: Assignment
    cost: float  # as a share of dense
    divergence: float  # predicted, in nats


class Search:
    """All that can be chosen from, with costs and predicted divergences; `plan` chooses."""

    def __init__(
        self,
        candidates: Mapping[Phase, Sequence[Candidate]],
        found: Mapping[Phase, Mapping[int, Found]],
        sensitivity: Sensitivity,
        costs: CostModel,
        tables: Mapping[Phase, Sequence[Mapping[str, int]]],
        free: Sequence[int],
    ) -> None:
        """found: by phase and length. tables: for each candidate the page summaries that it needs, by name, in bytes
        per page and head. free: the layers whose heads have a choice."""
        self._candidates = candidates
        self._found, self._sensitivity, self._costs = found, sensitivity, costs
        self._tables = {phase: [tuple(each.items()) for each in own] for phase, own in tables.items()}
        self._known: dict[tuple[Phase, int, int], list[_Part]] = {}
        layers, kv_heads = found["prefill"][costs.lengths[0]].error.shape[1:]
        self._options = [
            [
                self._frontier(layer, head) if layer in free else [self._option(DENSE, layer, head)]
                for head in range(kv_heads)
            ]
            for layer in range(layers)
        ]

    @property
    def most(self) -> float:
        """The predicted divergence of the cheapest plan."""
        return sum(options[-1].divergence for layer in self._options for options in layer)

    def plan(self, bound: float) -> Plan:
        """The cheapest plan whose predicted divergence is at most `bound` nats, up to the gaps between candidates."""
        if self.most <= bound:
            return self._settled([[options[-1].choice for options in layer] for layer in self._options], bound)
        low, high = 0.0, 1e12  # a price of 0 takes the cheapest
        for _ in range(ROUNDS):
            price = (low * high) ** 0.5 if low else high * 1e-3
            if self._plan(self._at(price)).divergence <= bound:
                high = price
            else:
                low = price
            if low and high / low < 1 + 1e-9:
                break
        spent = self._plan(self._spend(self._at(high), bound))
        return self._settled([list(row) for row in spent.heads], bound)

    def uniform(self, prefill: int, decode: int) -> Plan:
        """The same candidates for every head that has a choice."""
        one = Choice(prefill, decode, False)
        heads = tuple(
            tuple(one if len(options) > 1 else options[0].choice for options in layer) for layer in self._options
        )
        return self.judged(heads)

    def judged(self, heads: Assignment) -> Plan:
        """An assignment with its cost and predicted divergence."""
        options = [
            self._option(choice, layer, head) for layer, row in enumerate(heads) for head, choice in enumerate(row)
        ]
        cost = sum(each.cost for each in options) + sum(self._calls(row) for row in heads)
        return Plan(heads, cost, sum(each.divergence for each in options))

    def _calls(self, row: Sequence[Choice]) -> float:
        """What the selectors of a layer cost beyond what its heads pay for them."""
        total = 0.0
        for phase in PHASES:
            for number, sharing in Counter(getattr(choice, phase) for choice in row).items():
                kind = self._candidates[phase][number].kind
                total += self._costs.of_call(phase, kind, sharing, len(row))
        return total

    def _settled(self, heads: list[list[Choice]], bound: float) -> Plan:
        """Let heads of a layer share a selector, as long as that makes the whole cheaper and keeps the bound."""
        left = bound - self.judged(tuple(map(tuple, heads))).divergence
        for layer, row in enumerate(heads):
            while (better := self._shared(layer, row, left)) is not None:
                more, row[:] = better
                left -= more
        return self.judged(tuple(map(tuple, heads)))

    def _shared(self, layer: int, row: list[Choice], left: float) -> tuple[float, list[Choice]] | None:
        """The layer's choices with one of its selectors given up for another that it has, where that is cheaper: how
        much divergence that adds, and the choices."""
        now = self._judged_layer(layer, row)
        best: tuple[float, float, list[Choice]] | None = None
        for phase in PHASES:
            own = list(dict.fromkeys(getattr(choice, phase) for choice in row))
            for given_up, taken in permutations(own, 2):
                moved = [_moved(choice, phase, given_up, taken) for choice in row]
                cost, divergence = self._judged_layer(layer, moved)
                if cost < now[0] - 1e-12 and divergence - now[1] <= left and (best is None or cost < best[0]):
                    best = cost, divergence - now[1], moved
        return None if best is None else best[1:]

    def _judged_layer(self, layer: int, row: Sequence[Choice]) -> tuple[float, float]:
        options = [self._option(choice, layer, head) for head, choice in enumerate(row)]
        return sum(o.cost for o in options) + self._calls(row), sum(o.divergence for o in options)

    def density(self, plan: Plan, phase: Phase, length: int) -> float:
        """Measured in calibration, mean over heads."""
        table = self._found[phase][length].density
        own = [
            float(table[getattr(choice, phase), layer, head])
            for layer, row in enumerate(plan.heads)
            for head, choice in enumerate(row)
        ]
        return sum(own) / len(own)

    def memory(self, plan: Plan, length: int) -> float:
        """Of keys, values and page summaries, as a share of dense, mean over heads."""
        shares = []
        for row in plan.heads:
            for choice in row:
                tables = dict([*self._tables["prefill"][choice.prefill], *self._tables["decode"][choice.decode]])
                window = self._candidates["prefill"][choice.prefill].window if choice.streams else None
                shares.append(self._costs.memory_share(sum(tables.values()), window, length))
        return sum(shares) / len(shares)

    def _at(self, price: float) -> list[list[int]]:
        return [
            [
                min(range(len(options)), key=lambda n: (options[n].cost + price * options[n].divergence, n))
                for options in layer
            ]
            for layer in self._options
        ]

    def _spend(self, chosen: list[list[int]], bound: float) -> list[list[int]]:
        """Make single heads cheaper while the bound allows, the best bargain first."""
        left = bound - self._plan(chosen).divergence
        while True:
            best: tuple[float, int, int, int] | None = None
            for layer, row in enumerate(chosen):
                for head, now in enumerate(row):
                    options = self._options[layer][head]
                    for n in range(now + 1, len(options)):
                        more = options[n].divergence - options[now].divergence
                        gain = options[now].cost - options[n].cost
                        if more <= left and gain > 0 and (best is None or gain > best[0]):
                            best = gain, layer, head, n
            if best is None:
                return chosen
            _, layer, head, n = best
            options = self._options[layer][head]
            left -= options[n].divergence - options[chosen[layer][head]].divergence
            chosen[layer][head] = n

    def _plan(self, chosen: Sequence[Sequence[int]]) -> Plan:
        own = [
            [options[n] for options, n in zip(*pair, strict=True)] for pair in zip(self._options, chosen, strict=True)
        ]
        flat = [option for row in own for option in row]
        heads = tuple(tuple(option.choice for option in row) for row in own)
        return Plan(heads, sum(o.cost for o in flat), sum(o.divergence for o in flat))

    def _frontier(self, layer: int, head: int) -> list[Option]:
        """What no other option beats in both, from dense on: falling cost, rising divergence."""
        parts = {phase: self._parts(phase, layer, head) for phase in PHASES}
        choices = [Choice(p, d, False) for p in _unbeaten(parts["prefill"]) for d in _unbeaten(parts["decode"])]
        # of two that are alike the first is kept: streaming gives memory back for nothing
        options = [self._join(choice, parts) for choice in [*self._streaming, *choices]]
        options.sort(key=lambda option: (option.divergence, option.cost))
        kept: list[Option] = [self._join(DENSE, parts)]
        for option in options:
            if option.cost < kept[-1].cost:
                kept.append(option)
        return kept

    @property
    def _streaming(self) -> list[Choice]:
        windows = {c.window: n for n, c in enumerate(self._candidates["decode"]) if c.window is not None}
        return [
            Choice(n, windows[c.window], True)
            for n, c in enumerate(self._candidates["prefill"])
            if c.window is not None and c.window in windows
        ]

    def _option(self, choice: Choice, layer: int, head: int) -> Option:
        return self._join(choice, {phase: self._parts(phase, layer, head) for phase in PHASES})

    def _parts(self, phase: Phase, layer: int, head: int) -> list[_Part]:
        """Per candidate."""
        if (phase, layer, head) in self._known:
            return self._known[phase, layer, head]
        own, weight = self._found[phase], float(self._sensitivity[phase][layer, head])
        parts = []
        for number, candidate in enumerate(self._candidates[phase]):
            reads = {length: own[length].reads(number, layer, head) for length in self._costs.lengths}
            worst = max(float(own[length].error[number, layer, head]) for length in self._costs.lengths)
            cost = self._costs.of_phase(phase, candidate.kind, reads)
            parts.append(_Part(number, cost, weight * worst, self._tables[phase][number]))
        return self._known.setdefault((phase, layer, head), parts)

    def _join(self, choice: Choice, parts: Mapping[Phase, Sequence[_Part]]) -> Option:
        prefill, decode = parts["prefill"][choice.prefill], parts["decode"][choice.decode]
        window = self._candidates["prefill"][choice.prefill].window if choice.streams else None
        memory = self._costs.of_memory(sum(dict([*prefill.tables, *decode.tables]).values()), window)
        return Option(choice, prefill.cost + decode.cost + memory, prefill.divergence + decode.divergence)


def _moved(choice: Choice, phase: Phase, given_up: int, taken: int) -> Choice:
    """A streaming head keeps what it has: both of its selectors belong to its window."""
    if choice.streams or getattr(choice, phase) != given_up:
        return choice
    return Choice(taken, choice.decode, False) if phase == "prefill" else Choice(choice.prefill, taken, False)


def _unbeaten(parts: Sequence[_Part]) -> list[int]:
    """The candidates that no other beats in cost, divergence and memory alike."""

    def beaten(one: _Part) -> bool:
        return any(
            other.cost <= one.cost
            and other.divergence <= one.divergence
            and set(other.tables) <= set(one.tables)
            and (other.cost < one.cost or other.divergence < one.divergence)
            for other in parts
        )

    return [one.number for one in parts if not beaten(one)]
