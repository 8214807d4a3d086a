"""Which candidate each head gets: least cost under a bound on the whole model's predicted divergence from dense.

The predicted divergence of a choice is the sum over heads of sensitivity x squared relative error (a Gauss-Newton view:
near dense, the divergence of next-token distributions is quadratic in what attention gets wrong). Divergence adds up
over heads and cost over layers, so for a price of divergence each layer's best choices can be found alone (Lagrange);
the price is bisected until the bound is met, and what slack is left is spent greedily. Within a layer cost does not add
up, since a selector is called once for the neighbouring heads that share it, and attention once for the heads that keep
the same tokens: from each head's own best choice on, what makes the layer cheaper is changed, a step at a time.
docs/profiling.md has the formulas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.options import DENSE, Assignment, Choice, Option, Options

CLOSE = 1 + 1e-3  # prices that need not be told apart
Row = tuple[Choice, ...]  # of a layer, per KV head


@dataclass(frozen=True, slots=True)
class Plan:
    """Choices for all heads."""

    heads: Assignment
    cost: float  # as a share of dense
    divergence: float  # predicted, in nats


@dataclass(frozen=True, slots=True)
class _Judged:
    """A layer's choices, and what they come to."""

    row: Row
    cost: float
    divergence: float


class Search:
    """All that can be chosen from, with costs and predicted divergences; `plan` chooses."""

    def __init__(self, options: Options, free: Sequence[int]) -> None:
        """free: the layers whose heads have a choice."""
        self._own, self._found, self._costs = options, options.found, options.costs
        self._known: dict[tuple[int, float], _Judged] = {}  # what was settled, by layer and price
        self._costs_of_calls: dict[tuple[Phase, tuple[tuple[str, ...], ...]], float] = {}
        layers, kv_heads = self._found["prefill"][self._costs.lengths[0]].error.shape[1:]
        self._options = [
            [
                options.frontier(layer, head) if layer in free else [options.option(DENSE, layer, head)]
                for head in range(kv_heads)
            ]
            for layer in range(layers)
        ]
        self._used = [
            {phase: dict.fromkeys(each.choice.of(phase) for own in heads for each in own) for phase in PHASES}
            for heads in self._options
        ]
        self._cheapest = [self._settled(layer, 0.0) for layer in range(layers)]

    @property
    def most(self) -> float:
        """The predicted divergence of the cheapest plan."""
        return sum(layer.divergence for layer in self._cheapest)

    def plan(self, bound: float) -> Plan:
        """The cheapest plan whose predicted divergence is at most `bound` nats, up to the gaps between candidates."""
        if self.most <= bound:
            return _plan(self._cheapest)
        low, high = 0.0, 1e12  # a price of 0 takes the cheapest
        best = [self._judge(layer, (DENSE,) * len(heads)) for layer, heads in enumerate(self._options)]
        while high > CLOSE * low:
            price = (low * high) ** 0.5 if low else high * 1e-3
            settled = [self._settled(layer, price) for layer in range(len(self._options))]
            if sum(layer.divergence for layer in settled) <= bound:
                high, best = price, settled
            else:
                low = price
        return _plan(self._spent(best, bound))

    def judged(self, heads: Assignment) -> Plan:
        """An assignment with its cost and predicted divergence."""
        return _plan([self._judge(layer, row) for layer, row in enumerate(heads)])

    def density(self, plan: Plan, phase: Phase, length: int) -> float:
        """Measured in calibration, mean over heads; 1 for those whose candidate does nothing at this length."""
        table = self._found[phase][length].density
        own = [
            float(table[choice.of(phase), layer, head])
            if self._costs.acts(phase, self._own.kind(choice, phase), length)
            else 1.0
            for layer, row in enumerate(plan.heads)
            for head, choice in enumerate(row)
        ]
        return sum(own) / len(own)

    def memory(self, plan: Plan, length: int) -> float:
        """Of keys, values and page summaries, as a share of dense, mean over heads."""
        shares = [
            self._costs.memory_share(self._own.summary_bytes(choice), self._own.window(choice), length)
            for row in plan.heads
            for choice in row
        ]
        return sum(shares) / len(shares)

    def _judge(self, layer: int, row: Row) -> _Judged:
        options = [self._own.option(choice, layer, head) for head, choice in enumerate(row)]
        cost = sum(each.cost for each in options) + sum(self._calls(row, phase) for phase in PHASES)
        return _Judged(row, cost, sum(each.divergence for each in options))

    def _calls(self, row: Row, phase: Phase) -> float:
        groups: dict[tuple[int, int] | None, list[Choice]] = {}
        for choice in row:
            groups.setdefault(self._own.window(choice), []).append(choice)
        kinds = tuple(
            tuple(self._own.kind(next(run), phase) for _, run in groupby(own, key=lambda choice: choice.of(phase)))
            for own in groups.values()
        )
        if (phase, kinds) not in self._costs_of_calls:
            self._costs_of_calls[phase, kinds] = self._costs.of_calls(phase, kinds)
        return self._costs_of_calls[phase, kinds]

    def _settled(self, layer: int, price: float) -> _Judged:
        """A layer's choices at a price of divergence: each head's own best, then whatever change helps most."""
        if (layer, price) not in self._known:
            self._known[layer, price] = self._settle(layer, price)
        return self._known[layer, price]

    def _settle(self, layer: int, price: float) -> _Judged:
        def worth(judged: _Judged) -> float:
            return judged.cost + price * judged.divergence

        def alone(option: Option) -> float:
            return option.cost + price * option.divergence

        options = self._options[layer]
        best = self._judge(layer, tuple(min(own, key=alone).choice for own in options))
        if not self._free(layer):
            return best
        while True:
            found = min((self._judge(layer, row) for row in self._changes(layer, best.row)), key=worth)
            if worth(found) >= worth(best) - 1e-12:
                return best
            best = found

    def _free(self, layer: int) -> bool:
        """Whether any of its heads has a choice."""
        return any(len(own) > 1 for own in self._options[layer])

    def _changes(self, layer: int, row: Row) -> Iterator[Row]:
        """Another choice for one head; one candidate for all heads, or for those that have another one in common; one
        window for those that stream with another, for all, or for none."""
        for head, options in enumerate(self._options[layer]):
            for option in options:
                yield (*row[:head], option.choice, *row[head + 1 :])
        yield (DENSE,) * len(row)
        for phase in PHASES:
            used = dict.fromkeys(choice.of(phase) for choice in row)
            for old, new in product(used, dict.fromkeys((*used, DENSE.of(phase)))):
                yield tuple(c.moved(phase, new) if c.of(phase) == old and not c.streams else c for c in row)
            for new in self._used[layer][phase]:
                yield tuple(c if c.streams else c.moved(phase, new) for c in row)
        streaming = dict.fromkeys(choice for choice in row if choice.streams)
        for old_window, new_window in product(streaming, self._own.streaming):
            yield tuple(new_window if c == old_window else c for c in row)
        for window in streaming:
            yield (window,) * len(row)
        if streaming:
            yield tuple(Choice(c.prefill, c.decode, False) for c in row)

    def _spent(self, chosen: Sequence[_Judged], bound: float) -> list[_Judged]:
        """Change single layers while the bound allows it, what saves most first."""
        now = list(chosen)
        left = bound - sum(layer.divergence for layer in now)
        better: dict[int, list[_Judged]] = {}  # by layer, what is cheaper
        while True:
            for layer, own in enumerate(now):
                if layer not in better:
                    rows = self._changes(layer, own.row) if self._free(layer) else ()
                    changed = [self._judge(layer, row) for row in rows]
                    better[layer] = [each for each in changed if each.cost < own.cost - 1e-12]
            gains = [
                (now[layer].cost - each.cost, -layer, each)
                for layer, own in better.items()
                for each in own
                if each.divergence - now[layer].divergence <= left
            ]
            if not gains:
                return now
            _, negative, each = max(gains, key=lambda gain: gain[:2])
            layer = -negative
            left -= each.divergence - now[layer].divergence
            now[layer] = each
            del better[layer]


def _plan(layers: Sequence[_Judged]) -> Plan:
    return Plan(
        tuple(layer.row for layer in layers),
        sum(layer.cost for layer in layers),
        sum(layer.divergence for layer in layers),
    )
