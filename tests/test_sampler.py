"""Sampling against its definition in float64, one token at a time, and what must not depend on the batch."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.server.engine import sampler as sampler_module
from gossamer.server.engine.logits import SampleRow, Turn, adjust
from gossamer.server.engine.request import SamplingParams, TokenLogprob
from gossamer.server.engine.sampler import Sampled, Sampler, read_scores, uniform

V = 13


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **fields})


def row(
    seed: int = 0, *, prompt: Sequence[int] = (), output: Iterable[int] = (), forbid: Iterable[int] = (), **f: Any
) -> SampleRow:
    return SampleRow(params(**f), seed=seed, prompt=prompt, output=output, forbid=forbid)


def drawn(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """What each row gets, as the engine reads it."""
    draw = Sampler().draw(logits, [Turn(each) for each in rows])
    assert draw.tokens.tolist() == draw.table[:, 0].tolist()
    return draw.read(draw.table)


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    return [each.token for each in drawn(logits, rows)]


def scores(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob] | None:
    return read_scores(Sampler().score(logits, tokens, top))


def slow_logits(
    logits: NDArray[np.float64], p: SamplingParams, prompt: list[int], output: list[int], forbid: list[int]
) -> NDArray[np.float64]:
    """Biases and penalties from their definitions."""
    scores = logits.astype(np.float64).copy()
    if len(output) < p.min_tokens:
        scores[list(forbid)] = -np.inf
    for token, bias in p.logit_bias:
        scores[token] += bias
    for token in set(prompt) | set(output):
        scores[token] = (
            scores[token] / p.repetition_penalty if scores[token] > 0 else scores[token] * p.repetition_penalty
        )
    for token, count in Counter(output).items():
        scores[token] -= p.frequency_penalty * count + p.presence_penalty
    return scores


def slow_distribution(scores: NDArray[np.float64], p: SamplingParams) -> NDArray[np.float64]:
    """Temperature, min_p, top_k, top_p from their definitions. Skips examples that lie on the edge of a cut."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    weights = np.exp((scores - scores.max()) / p.temperature)
    assume(all(abs(w - p.min_p) > 1e-6 for w in weights))
    kept = [i for i in order if weights[i] >= p.min_p][: p.top_k or None]
    total, before = sum(weights[i] for i in kept), 0.0
    chosen = []
    for i in kept:
        assume(p.top_p == 1 or not chosen or abs(before - p.top_p * total) > 1e-6)
        if before < p.top_p * total or not chosen:
            chosen.append(i)
        before += weights[i]
    result = np.zeros(len(scores))
    result[chosen] = weights[chosen]
    return result / result.sum()


LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=V, max_size=V)
TOKENS = st.lists(st.integers(0, V - 1), max_size=12)
FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.25, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 5, V, V + 7]),
        "top_p": st.sampled_from([1.0, 1.0, 0.999, 0.77, 0.31, 1e-300]),
        "min_p": st.sampled_from([0.0, 0.0, 0.013, 0.2]),
    }
)
CHANGES = st.fixed_dictionaries(
    {
        "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, -1.0]),
        "repetition_penalty": st.sampled_from([1.0, 2.0, 0.5]),
        "logit_bias": st.dictionaries(
            st.integers(0, V - 1), st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=4
        ).map(lambda bias: tuple(bias.items())),
        "min_tokens": st.sampled_from([0, 0, 3, 50]),
    }
)


@given(logits=LOGITS, filters=FILTERS)
@settings(max_examples=120, deadline=None)
def test_tokens_follow_the_definition(logits: list[float], filters: dict[str, Any]) -> None:
    expected = slow_distribution(np.array(logits), params(**filters))
    grid = (np.arange(100) + 0.5) / 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "uniform", lambda seed, step: float(grid[seed]))
        found = sample(torch.tensor([logits] * 100), [row(i, **filters) for i in range(100)])
    edges = expected.cumsum()
    for u, token in zip(grid, found, strict=True):
        assert expected[token] > 0
        if abs(edges - u).min() > 1e-6:
            assert token == int(np.searchsorted(edges, u, side="right"))


@given(
    logits=st.lists(LOGITS, min_size=1, max_size=4),
    changes=CHANGES,
    prompt=TOKENS,
    output=TOKENS,
    forbid=st.lists(st.integers(0, V - 1), max_size=3),
)
@settings(max_examples=120, deadline=None)
def test_penalties_and_biases_follow_their_definitions(
    logits: list[list[float]], changes: dict[str, Any], prompt: list[int], output: list[int], forbid: list[int]
) -> None:
    rows = [
        row(prompt=prompt, output=output, forbid=forbid, **(changes if i % 2 == 0 else {})) for i in range(len(logits))
    ]
    found = torch.tensor(logits)
    adjust(found, [Turn(each) for each in rows])
    for i, line in enumerate(logits):
        plain = np.array(line)
        expected = slow_logits(plain, params(**changes), prompt, output, forbid) if i % 2 == 0 else plain
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=1e-6, atol=1e-5)
    greedy = [row(prompt=prompt, output=output, forbid=forbid, temperature=0.0, **changes) for _ in logits]
    for line, token in zip(logits, sample(torch.tensor(logits), greedy), strict=True):
        scores = slow_logits(np.array(line), params(**changes), prompt, output, forbid)
        assert scores[token] >= scores.max() - 1e-4


def test_counts_grow_with_the_output() -> None:
    tokens = [n % 101 for n in range(500)]
    grown = row(presence_penalty=1.0, frequency_penalty=0.5)
    for token in tokens:
        grown.append(token)
    ids, counts = grown.output_counts()
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == dict(Counter(tokens))
    rebuilt = row(presence_penalty=1.0, frequency_penalty=0.5, output=tokens)
    assert rebuilt.step == grown.step == 500
    logits = torch.randn(1, 200)
    assert sample(logits, [grown]) == sample(logits, [rebuilt])


def test_frequencies_match_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
    n = 20_000
    rows = [row(seed, temperature=0.8) for seed in range(n // 4)]
    counts: Counter[int] = Counter()
    for _ in range(4):
        found = sample(logits.expand(len(rows), -1), rows)
        counts.update(found)
        for each, token in zip(rows, found, strict=True):
            each.append(token)
    expected = torch.softmax(logits.double() / 0.8, 0).numpy() * n
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(len(logits)))
    assert chi_square < 20.5  # 5 degrees of freedom: one in a thousand; the seeds are fixed


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_step_alone() -> None:
    numbers = np.array([[uniform(seed, step) for step in range(100)] for seed in range(100)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(np.unique(numbers)) == 10_000
    assert abs(numbers.mean() - 0.5) < 0.015 and abs(numbers.var() - 1 / 12) < 0.004
    for a, b in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):  # seed by seed, step by step
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05
    assert uniform(7, 3) == numbers[7, 3]
    for seed in (-1, 2**63 - 1, -(2**63), 2**70):
        assert 0 <= uniform(seed, 0) < 1
    assert uniform(-1, 0) != uniform(1, 0)


KINDS: list[Callable[[int], SampleRow]] = [
    lambda i: row(i, temperature=0.0),
    lambda i: row(i),
    lambda i: row(i, temperature=0.3, logprobs=0),
    lambda i: row(i, temperature=0.0, logprobs=5),
    lambda i: row(i, top_k=7, logprobs=20),
    lambda i: row(i, top_p=0.9),
    lambda i: row(i, top_p=0.99, top_k=40, min_p=0.001, temperature=1.7),
    lambda i: row(i, min_p=0.1),
    lambda i: row(i, top_p=0.95, prompt=range(0, 300, 7), output=[1, 2, 2, 3], repetition_penalty=1.3, logprobs=3),
    lambda i: row(i, output=[i, 5, 5], presence_penalty=1.0, frequency_penalty=0.2),
    lambda i: row(i, logit_bias=((3, 10.0), (4, -100.0))),
    lambda i: row(i, temperature=0.0, min_tokens=5, forbid=[0, 1, 2]),
]


@pytest.mark.parametrize("vocab", [331, 5003])
def test_a_row_does_not_depend_on_its_batch_mates(vocab: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3 * len(KINDS), vocab, generator=generator) * 3
    make = lambda i: KINDS[i % len(KINDS)](i)  # noqa: E731
    alone = [drawn(logits[i : i + 1], [make(i)])[0] for i in range(len(logits))]
    for seed in range(4):
        some = np.random.default_rng(seed).permutation(len(logits))[: 5 + 9 * seed].tolist()
        assert drawn(logits[some], [make(i) for i in some]) == [alone[i] for i in some]


def test_seed_and_step_decide() -> None:
    logits = torch.zeros(1, 1000)
    draws = {(seed, step): sample(logits, [row(seed, output=[0] * step)]) for seed in range(5) for step in range(5)}
    again = {key: sample(logits, [row(key[0], output=[0] * key[1])]) for key in draws}
    assert draws == again
    assert len({token for [token] in draws.values()}) > 20


def test_other_hardware_ranks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(8 * len(KINDS), 997, generator=torch.Generator().manual_seed(0))
    logits *= torch.linspace(0, 4, len(logits))[:, None]
    rows = lambda: [KINDS[i % len(KINDS)](i) for i in range(len(logits))]  # noqa: E731
    expected = sample(logits, rows())
    monkeypatch.setattr(sampler_module, "_ranked_on_cpu", sampler_module._ranked_on_gpu)
    monkeypatch.setattr(sampler_module, "_CACHED", 7 * 997)
    assert sample(logits, rows()) == expected
    assert sample(logits[4:5], [row(4, top_k=7)]) == expected[4:5]  # few enough to take topk


# --- edges


def test_ties_go_to_the_smaller_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert sample(logits, [row(temperature=0.0)]) == [1]
    assert {sample(logits, [row(seed, top_k=2)])[0] for seed in range(60)} == {1, 2}
    assert {sample(logits, [row(seed, top_p=0.3)])[0] for seed in range(60)} == {1}
    assert {sample(logits, [row(seed, min_p=1.0)])[0] for seed in range(60)} == {1, 2, 3}
    assert sample(torch.zeros(1, 70_001), [row(temperature=0.0)]) == [0]


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-45}, {"temperature": 1.1e-5}, {"top_k": 1}, {"top_p": 1e-300}, {"temperature": 0.0}]
)
def test_extreme_parameters_mean_greedy(fields: dict[str, Any]) -> None:
    logits = torch.randn(50, 99, generator=torch.Generator().manual_seed(0))
    assert sample(logits, [row(i, **fields) for i in range(50)]) == logits.argmax(dim=1).tolist()


def test_all_tokens_biased_away_still_give_one() -> None:
    bias = tuple((i, -100.0) for i in range(V))
    found = drawn(torch.randn(20, V), [row(i, logit_bias=bias, logprobs=1) for i in range(20)])
    assert all(0 <= s.token < V and s.finite and s.logprob and math.isfinite(s.logprob.logprob) for s in found)
    everything = [row(i, min_tokens=1, forbid=range(V), temperature=t) for i, t in enumerate([0.0, 1.0, 1.0])]
    assert all(0 <= token < V for token in sample(torch.randn(3, V), everything))
    anything = [row(seed, min_tokens=1, forbid=range(V)) for seed in range(200)]
    assert set(sample(torch.randn(200, V), anything)) == set(range(V))


def test_end_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    for temperature in (0.0, 1.0):
        each = row(min_tokens=2, forbid=[1, 2], temperature=temperature, top_k=1)
        chosen = []
        for _ in range(4):
            [token] = sample(logits, [each])
            chosen.append(token)
            each.append(token)
        assert chosen == [3, 3, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 4, V - 1])
def test_a_broken_row_is_alone_with_it(bad: float, place: int) -> None:
    logits = torch.randn(len(KINDS) * 2, 331, generator=torch.Generator().manual_seed(2))
    rows = lambda: [KINDS[i // 2](i) for i in range(len(logits))]  # noqa: E731
    expected = drawn(logits, rows())
    logits[::2, place] = bad
    for i, (sampled, before) in enumerate(zip(drawn(logits, rows()), expected, strict=True)):
        if i % 2 == 0:
            assert not sampled.finite and sampled.logprob is None and 0 <= sampled.token < 331
        else:
            assert sampled == before and sampled.finite
    all_gone = torch.full((1, V), -math.inf)
    assert not drawn(all_gone, [row()])[0].finite


def test_masked_logits_are_never_chosen() -> None:
    logits = torch.full((100, V), -math.inf)
    logits[:, 3] = 0.0
    logits[:, 8] = -1.0
    assert set(sample(logits, [row(i) for i in range(100)])) == {3, 8}
    top = drawn(logits[:1], [row(logprobs=3)])[0].logprob
    assert top is not None and all(math.isfinite(value) for _, value in top.top)


def test_half_precision_and_untouched_logits() -> None:
    logits = torch.randn(len(KINDS), 331, generator=torch.Generator().manual_seed(3)).bfloat16()
    before = logits.clone()
    rows = lambda: [kind(i) for i, kind in enumerate(KINDS)]  # noqa: E731
    assert drawn(logits, rows()) == drawn(logits.float(), rows())
    assert torch.equal(logits, before)
    full = before.float()
    drawn(full, rows())
    assert torch.equal(full, before.float())


def test_the_smallest_number_chooses_no_token_of_weight_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "uniform", lambda seed, step: 0.0)
    assert sample(torch.tensor([[-math.inf, -90.0, 0.0, 1.0]]), [row()]) == [2]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert {sample(torch.zeros(1, 4), [row(seed, top_p=0.5)])[0] for seed in range(60)} == {0, 1}


@pytest.mark.parametrize("vocab", range(1, 10))
def test_a_broken_row_gives_a_token_that_exists(vocab: int) -> None:
    logits = torch.full((20, vocab), math.nan)
    found = drawn(logits, [row(i, logprobs=0, top_p=0.9 if i % 2 else 1.0) for i in range(20)])
    assert all(0 <= sampled.token < vocab and not sampled.finite for sampled in found)


# --- log-probabilities


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(30, 331, generator=torch.Generator().manual_seed(4)) * 3
    logits[::2] -= 20  # negative all over
    rows = [
        row(i, logprobs=i % 7, temperature=i % 3, logit_bias=((5, 100.0),), output=[5], presence_penalty=2.0)
        for i in range(30)
    ]
    exact = torch.log_softmax(logits.double(), dim=1)
    for i, sampled in enumerate(drawn(logits, rows)):
        found = sampled.logprob
        assert found is not None and found.token == sampled.token == 5
        assert found.logprob == pytest.approx(float(exact[i, 5]), abs=1e-6)
        assert found.logprob == float(np.float32(found.logprob))
        best = sorted(range(331), key=lambda t: (-float(logits[i, t]), t))[: i % 7]
        assert [token for token, _ in found.top] == best
        for token, value in found.top:
            assert value == pytest.approx(float(exact[i, token]), abs=1e-6)


def test_the_same_float_in_both_places_and_ties_by_id() -> None:
    logits = torch.tensor([[0.1, 0.7, 0.7, 0.3], [0.7, 0.1, 0.3, 0.7]])
    first, second = drawn(logits, [row(temperature=0.0, logprobs=20)] * 2)
    for sampled, order in ((first, [1, 2, 3, 0]), (second, [0, 3, 2, 1])):
        assert sampled.logprob is not None
        assert [token for token, _ in sampled.logprob.top] == order
        assert sampled.logprob.logprob == max(value for _, value in sampled.logprob.top)
    assert drawn(logits, [row(temperature=0.0), row(temperature=0.0, logprobs=0)])[0].logprob is None


def test_prompt_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(5)).bfloat16()
    tokens = torch.randint(0, 97, (50,), generator=torch.Generator().manual_seed(6))
    exact = torch.log_softmax(logits.double(), dim=1)
    whole = scores(logits, tokens.tolist(), 3)
    assert whole is not None
    assert [each.token for each in whole] == tokens.tolist()
    for i, each in enumerate(whole):
        assert each.logprob == pytest.approx(float(exact[i, each.token]), abs=1e-6)
        assert len(each.top) == 3 and each.top[0][1] == pytest.approx(float(exact[i].max()), abs=1e-6)
        assert each.logprob in [v for t, v in each.top if t == each.token] or each.token not in dict(each.top)
    monkeypatch.setattr(sampler_module, "_CACHED", 97 * 7)
    assert scores(logits, tokens.tolist(), 3) == whole
    assert [each.top for each in scores(logits, tokens.tolist(), 0) or ()] == [()] * 50
    assert scores(logits[:0], [], 3) == []
    for bad in (math.nan, math.inf):
        logits[20, 5] = bad
        assert scores(logits, tokens.tolist(), 3) is None


@given(
    logits=st.lists(LOGITS, min_size=1, max_size=5),
    changes=CHANGES,
    prompt=TOKENS,
    outputs=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), min_size=5, max_size=5),
    late=st.lists(st.booleans(), min_size=5, max_size=5),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_token_that_only_the_device_knows_counts_as_others_do(
    logits: list[list[float]],
    changes: dict[str, Any],
    prompt: list[int],
    outputs: list[list[int]],
    late: list[bool],
    temperature: float,
) -> None:
    """The newest token of some rows lies among those of the step before, in another order than the rows."""
    fields: dict[str, Any] = {"prompt": prompt, "forbid": [2], "temperature": temperature, "logprobs": 1, **changes}
    count = len(logits)
    known = [Turn(row(i, output=outputs[i], **fields)) for i in range(count)]
    unread = torch.tensor([output[-1] for output in outputs[:count]]).flip(0)
    turns = [
        Turn(row(i, output=outputs[i][:-1], **fields), count - 1 - i) if late[i] else known[i] for i in range(count)
    ]
    scores = torch.tensor(logits)
    expected, found = Sampler().draw(scores, known), Sampler().draw(scores, turns, unread)
    assert torch.equal(found.table, expected.table) and torch.equal(found.tokens, expected.tokens)
    assert [turn.step for turn in turns] == [turn.row.step for turn in known]


class _NoReads(TorchDispatchMode):
    """Fails where an operation would read a value from the device in the middle of its work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


def test_the_device_is_not_read_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "_ranked_on_cpu", sampler_module._ranked_on_gpu)
    logits = torch.randn(len(KINDS), 331)
    with _NoReads():
        drawn(logits, [kind(i) for i, kind in enumerate(KINDS)])
        scores(logits, list(range(len(KINDS))), 3)
        with pytest.raises(AssertionError):
            logits[0, 0].item()


def test_ids_outside_the_vocabulary_never_reach_the_logits() -> None:
    for wrong in (V, -1):
        with pytest.raises(AssertionError, match="outside"):
            sample(torch.zeros(2, V), [row(), row(logit_bias=((wrong, 1.0),))])
