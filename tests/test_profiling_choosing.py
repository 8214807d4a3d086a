"""Plans are tried until one holds its bound: which of them is chosen, with trials that say what a test wants."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from gossamer.attention.profiling.choosing import Chooser, Trials
from gossamer.attention.profiling.fidelity import Score, Trial
from gossamer.attention.profiling.options import DENSE, Assignment, Choice
from gossamer.attention.profiling.profile import Bound
from gossamer.attention.profiling.search import Plan, Search
from tests.test_profiling_search import LENGTHS, costs, found

TIGHT, WIDE = Bound("balanced", 1.0, 0.1), Bound("fast", 4.0, 0.5)
MOST = 16.0


def made_up(budget: float, cost: Callable[[float], float]) -> Plan:
    """One head, whose choice tells the budget in thousandths."""
    return Plan(((Choice(round(1000 * budget), 0, False),),), cost(budget), budget)


def chooser(divergence: Callable[[float], float], cost: Callable[[float], float]) -> Chooser:
    """Plans cost and diverge, at every length alike, as they are told to for their budgets."""

    def beside_dense(heads: Assignment, length: int, most: float, what: str) -> tuple[Trial, Trial]:
        def trial(nats: float) -> Trial:
            return Trial((Score("text", length, nats, 1.0, 0, 0),), {})

        return trial(divergence(heads[0][0].prefill / 1000)), trial(0.0)

    trials = SimpleNamespace(
        settings=SimpleNamespace(lengths=LENGTHS, bounds=(WIDE, TIGHT)),
        all_dense=((DENSE,),),
        progress=SimpleNamespace(say=lambda text: None),
        beside_dense=beside_dense,
    )
    search = SimpleNamespace(
        most=MOST,
        plan=lambda budget: made_up(budget, cost),
        judged=lambda heads: Plan(heads, 1.0, 0.0),
    )
    return Chooser(cast(Search, search), cast(Trials, trials), costs(), found(0))


def falling(budget: float) -> float:
    return 1 / (1 + budget)


@pytest.mark.parametrize("bound", [TIGHT, WIDE])
def test_a_budget_is_found_that_holds_its_bound(bound: Bound) -> None:
    plan = chooser(lambda budget: 0.3 * budget, falling).find(bound)
    assert 0.9 * bound.divergence < 0.3 * plan.divergence <= bound.divergence


def test_the_cheapest_plan_that_held_is_chosen() -> None:
    """A larger budget may give a dearer plan, by the gap between candidates."""
    ours = chooser(lambda budget: budget, lambda budget: falling(budget) + 0.2 * (budget > 0.04))
    plan = ours.find(TIGHT)
    held = [each for each in ours.attempts if each.held]
    assert max(each.budget for each in held) > 0.08
    assert plan.divergence <= 0.04
    assert plan.cost == min(each.plan.cost for each in held)


def test_a_wider_bound_gets_no_dearer_plan_than_a_tighter_one() -> None:
    ours = chooser(lambda budget: budget, lambda budget: falling(budget) + 0.5 * (budget > 0.1))
    plans = [ours.find(bound) for bound in (TIGHT, WIDE)]
    assert plans[0] == plans[1]


def test_what_held_a_wider_bound_says_nothing_of_a_tighter_one() -> None:
    """Points may be asked for in any order."""
    ours = chooser(lambda budget: budget, falling)
    plans = [ours.find(bound) for bound in (WIDE, TIGHT)]
    assert TIGHT.divergence < plans[0].divergence <= WIDE.divergence
    assert 0.9 * TIGHT.divergence < plans[1].divergence <= TIGHT.divergence


def test_dense_is_chosen_where_nothing_holds_and_where_nothing_that_does_is_cheaper() -> None:
    dense = ((DENSE,),)
    assert chooser(lambda budget: 9.0, falling).find(TIGHT).heads == dense
    assert chooser(lambda budget: 0.0, lambda budget: 1.1).find(TIGHT).heads == dense


def test_the_cheapest_of_all_is_tried_first() -> None:
    ours = chooser(lambda budget: 0.0, falling)
    assert ours.find(TIGHT).divergence == MOST and len(ours.attempts) == 1
