"""The statistics of `gossamer eval` against published values, and what its cells add up."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.server.eval.question import Answer, Likelihood, Passage, Question, Use
from gossamer.server.eval.results import Outcome, Predicted, cells, mean_interval, paired, wilson

SCORES = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1)


def test_wilsons_interval() -> None:
    """81 of 263: Newcombe 1998 (two-sided methods for the single proportion), table I."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_newcombes_paired_interval() -> None:
    """Newcombe 1998 (paired data), table II, method 10: 36, 12, 2 and 0 pairs."""
    own = [1.0] * 36 + [1.0] * 12 + [0.0] * 2
    base = [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    difference, (low, high) = paired(base, own)
    assert difference == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@given(scores=SCORES)
def test_an_interval_holds_its_difference(scores: list[tuple[float, float]]) -> None:
    base, own = zip(*scores, strict=True)
    difference, (low, high) = paired(base, own)
    assert -1 <= low <= difference + 1e-9 and difference - 1e-9 <= high <= 1
    turned, (back, forth) = paired(own, base)
    assert (turned, back, forth) == pytest.approx((-difference, -high, -low))


def test_a_mean_has_an_interval() -> None:
    assert mean_interval([3.0]) == (3.0, 3.0)
    assert mean_interval([1.0, 3.0]) == pytest.approx((2 - 1.96, 2 + 1.96), abs=1e-3)


def outcome(point: str, reply: str, use: Use, number: int = 0) -> Outcome:
    question = Question("t", 1024, "d", number, (), "p", ("12", "34"), 100, 8)
    return Outcome(point, question, Answer(reply, use))


def test_cells_count_answers_and_weigh_densities() -> None:
    """A question about a cached document computes little, and so weighs little in the density."""
    whole, tail = Use(1000, 0, 2, 0.5, 0.25), Use(1000, 960, 3, 1.0, None)
    made = cells(
        [
            outcome("dense", "12 and 34", whole),
            outcome("dense", "12", tail, 1),
            outcome("fast", "12", whole),
            outcome("fast", "nothing", tail, 1),
        ],
        [],
        "dense",
    )
    dense, fast = made
    assert (dense.units, dense.found, dense.references, dense.whole, dense.value) == (2, 3, 4, 1, 0.75)
    assert dense.difference is None and dense.difference_interval is None
    assert (fast.value, fast.difference) == (0.25, -0.5)
    pairs = 500500, 500500 - 960 * 961 / 2
    assert fast.densities.prefill == pytest.approx((0.5 * pairs[0] + pairs[1]) / sum(pairs))
    assert fast.densities.decode == 0.25  # what nobody said does not count


def test_texts_are_compared_run_by_run() -> None:
    def text(point: str, shift: float) -> Predicted:
        logprobs = tuple(-1.0 - shift * (n >= 64) for n in range(128))
        return Predicted(point, Passage("perplexity", 2048, "d", (1, 2), 128), Likelihood(logprobs, Use(2, 0, 1)))

    dense, fast = cells([], [text("exact", 0.0), text("fast", 0.5)], "exact")
    assert (dense.units, dense.value, dense.perplexity) == (2, 1.0, math.e)
    assert (fast.value, fast.difference) == (1.25, 0.25)
    assert fast.difference_interval == pytest.approx((0.25 - 0.49, 0.25 + 0.49), abs=1e-3)


def test_without_a_baseline_there_is_no_difference() -> None:
    (cell,) = cells([outcome("served", "12", Use(10, 0, 2))], [], None)
    assert cell.difference is None and cell.densities.prefill is None
