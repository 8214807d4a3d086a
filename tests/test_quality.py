"""Second looks: what they find against float64, whom they ask, and that answers do not notice."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attend_cases import Life, run, uniform
from engines import ask, make_engine
from kernel_cases import Case, make_case, reference
from tiny_models import VOCAB
from torch import Tensor

from gossamer.attention import second_look
from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.quality import QualitySampler, layer_groups
from gossamer.attention.second_look import QUERIES, Check, Quality, Watch, compare, read_keys, rows_of
from gossamer.attention.selectors import BlockSparse, Budget, Dense, SinkRecent
from gossamer.attention.step import Span, Step, plan_step
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent
from gossamer.kvcache.table import PageTable
from gossamer.server.config import ConfigError, ServerConfig
from gossamer.server.engine.model import Model
from gossamer.server.engine.quality import LEAST, REST_SECONDS, Bounds, Checked, Guard

FEW = Budget("tokens", 128)
SPARSE = HeadPolicy(BlockSparse(FEW), BlockSparse(FEW, "bounds"), KeepAll())
LATE = HeadPolicy(BlockSparse(FEW, above=300), BlockSparse(FEW, above=300), KeepAll())
STREAMING = HeadPolicy(SinkRecent(64, 128), SinkRecent(64, 128), KeepSinkRecent(64, 128))


def right(case: Case, n: int, g: int, softcap: float, sinks: Tensor | None) -> Quality:
    """One check by the definition, in float64, with the whole matrix."""
    row, ratio = case.blocks.rows[n], case.kv.ratio
    head = int(case.kv.heads[g])
    given = reference(case, softcap, sinks)[0]
    recalls, tops, shares, wrong, whole = [], [], [], [], []
    for i in range(0, row.count, -(-row.count // QUERIES)):
        pos = row.pos + i
        key = torch.arange(pos + 1)
        sink, window = int(case.kv.sink[row.seq, g]), int(case.kv.window[row.seq, g])
        read = torch.isin(key, case.selected[g][n]) & ((key > pos - window) | (key < sink))
        shares.append(read.double().mean())
        for h in range(head * ratio, (head + 1) * ratio):
            scores = case.keys[row.seq][: pos + 1, g] @ case.q[row.token + i, h].double() * case.scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.softmax(0)
            recalls.append(weights[read].sum())
            tops.append(read[scores.argmax()].double())
            if sinks is not None:
                weights = torch.cat([scores, sinks[h : h + 1].double()]).softmax(0)[:-1]
            dense = weights @ case.values[row.seq][: pos + 1, g]
            wrong.append(given[row.token + i, h] - dense)
            whole.append(dense)
    error = torch.stack(wrong).norm() / torch.stack(whole).norm()
    return Quality(*(float(torch.stack(each).mean()) for each in (recalls, [error], tops, shares)))


@pytest.mark.parametrize("piece", [64, 2**14])
@pytest.mark.parametrize(
    "options",
    [
        {"spans": ((0, 130), (70, 200)), "density": 0.4, "tokens": 20, "ratio": 2},
        {
            "spans": ((0, 300), (0, 33)),
            "density": 0.6,
            "windows": [(3, 90), (5, 40)],
            "ratio": 4,
            "heads": (1, 3),
        },
        {"spans": ((700, 1), (64, 1), (5, 1)), "tile": 1, "density": 0.2, "tokens": 9, "ratio": 1, "heads": (1, 3)},
        {"spans": ((300, 20),), "density": 0.3, "fp8": True, "ratio": 2},
    ],
    ids=["tiles", "windows", "decode", "fp8"],
)
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "softcap-and-sinks"])
def test_a_second_look_is_right(
    options: dict[str, Any], piece: int, extra: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_look, "MOST_TOKENS", piece)
    case = make_case(**options)
    kv, sinks = case.kv, torch.linspace(-1, 2, case.q.shape[1]) if extra else None
    given = reference(case, 5.0 if extra else 0.0, sinks)[0].float()
    for n, row in enumerate(case.blocks.rows):
        for g, head in enumerate(kv.heads.tolist()):
            own = slice(head * kv.ratio, (head + 1) * kv.ratio)
            length = row.pos + row.count
            read = read_keys(case.index, g, n, length)
            chosen = case.selected[g][n]
            assert read.nonzero()[:, 0].tolist() == sorted(set(chosen[chosen < length].tolist()))
            found = compare(
                case.q[rows_of(row), own],
                given[rows_of(row), own],
                kv,
                g,
                row,
                read,
                scale=case.scale,
                softcap=5.0 if extra else 0.0,
                sinks=None if sinks is None else sinks[own],
            )
            expected = right(case, n, g, 5.0 if extra else 0.0, sinks)
            torch.testing.assert_close(found.double(), torch.tensor(expected).double(), atol=2e-5, rtol=2e-5)


def test_layers_are_told_apart_in_three_runs() -> None:
    assert layer_groups(32) == [("0-9", range(10)), ("10-20", range(10, 21)), ("21-31", range(21, 32))]
    assert layer_groups(4) == [("0", range(1)), ("1", range(1, 2)), ("2-3", range(2, 4))]
    assert layer_groups(1) == [("0", range(1))]


def a_step(
    spans: list[Span], points: list[OperatingPoint], policy: AttentionPolicy
) -> tuple[Step, list[PageTable], KVCache]:
    groups = group_heads(policy.rules())
    cache = KVCache(groups, [100] * len(groups), ratio=2, head_dim=32, dtype=torch.float32)
    tables = []
    for span, point in zip(spans, points, strict=True):
        rules = [point.heads[group.slots[0][0]][group.slots[0][1][0]].keep for group in groups]
        table = cache.table(rules, b"")
        cache.grow(table, span.first)
        cache.trim(table)
        cache.grow(table, span.new)
        tables.append(table)
    return plan_step(spans, cache.views(tables), points, 2), tables, cache


def chosen(sampler: QualitySampler, *args: Any) -> tuple[list[Check], list[Check]]:
    watch = sampler.choose(*args)
    return ([], []) if watch is None else (watch._left, list(watch.blind))


def test_heads_are_asked_where_they_may_leave_keys_out() -> None:
    """Not dense ones, not below a selector's length, not in layers with a window of their own."""
    point = OperatingPoint("p", ((SPARSE, DENSE), (LATE, DENSE), (SPARSE, SPARSE), (DENSE, DENSE), (SPARSE, SPARSE)))
    policy = AttentionPolicy("p", (OperatingPoint("exact", ((DENSE,) * 2,) * 5), point))
    spans = [Span(0, 128, 128), Span(320, 64, 500), Span(400, 1, 100), Span(200, 64, 500)]
    points = [point, point, point, policy.points[0]]
    step, tables, _ = a_step(spans, points, policy)
    sampler = QualitySampler(1.0, (None, None, None, None, 100))
    found = [check for _ in range(50) for check in chosen(sampler, step, tables, True)[0]]
    assert {(c.layers, c.layer, c.head) for c in found if not c.decode and c.block < 2} == {
        ("0", 0, 0), ("1-2", 2, 0), ("1-2", 2, 1)
    }  # fmt: skip
    later = {(c.layer, c.head) for c in found if not c.decode and c.block == 2}
    assert later == {(0, 0), (1, 0), (2, 0), (2, 1)} == {(c.layer, c.head) for c in found if c.decode}
    assert {c.block for c in found if not c.decode} == {0, 1, 2}, "dense requests have nothing to check"
    assert len([c for c in found if c.decode]) == 50 * 2, "one of each group of layers that has some"
    assert not [c for c in chosen(sampler, step, tables, False)[0] if c.decode]


def test_the_rate_is_that_of_tiles_and_of_steps() -> None:
    point = uniform("p", SPARSE, SPARSE)
    policy = AttentionPolicy("p", (point,))
    step, tables, _ = a_step([Span(0, 3200, 3200)], [point], policy)
    sampler = QualitySampler(0.1, (None,))
    found = sum(len(chosen(sampler, step, tables, False)[0]) for _ in range(100))
    assert 400 < found < 600  # of 5,000 tiles; one layer, one group
    assert 60 < sum(sampler.generated([point]) for _ in range(1000)) < 140
    assert not any(sampler.generated([uniform("exact", DENSE)]) for _ in range(100)), "nothing to look for"
    again = QualitySampler(0.0, (None,))
    assert again.choose(step, tables, False) is None and not any(again.generated([point]) for _ in range(100))


def test_heads_that_gave_keys_back_cannot_be_checked() -> None:
    point = uniform("p", STREAMING, SPARSE)
    policy = AttentionPolicy("p", (uniform("exact", DENSE, DENSE), point))
    step, tables, _ = a_step([Span(0, 640, 640), Span(640, 64, 1000)], [point, point], policy)
    sampler = QualitySampler(1.0, (None,))
    pairs = [chosen(sampler, step, tables, False) for _ in range(50)]
    can, cannot = ([check for pair in pairs for check in pair[i]] for i in (0, 1))
    assert {(c.head, c.block) for c in cannot} == {(0, 10)}, "the first chunk still has all keys"
    assert {(c.head, c.block) for c in can} == {(0, n) for n in range(10)} | {(1, n) for n in range(11)}


@pytest.mark.parametrize("chunk", [1000, 65])
def test_looking_changes_nothing_and_finds_what_is_left_out(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Check, Quality]] = []
    point = uniform("p", SPARSE, STREAMING, DENSE, SPARSE)
    policy = AttentionPolicy("p", (point,))
    lives = [Life(500, 450, point, 1), Life(260, 250, point, 2)]
    plain = run(policy, lives, lambda: chunk)
    sampler = QualitySampler(1.0, (None,))

    def watched(spans: Any, views: Any, points: Any, ratio: int) -> Step:
        step = plan_step(spans, views, points, ratio)
        lengths = [span.first + span.new for span in spans]
        tables = [SimpleNamespace(rows=views_rows(step, n, length)) for n, length in enumerate(lengths)]
        watches.append(sampler.choose(step, tables, True))  # type: ignore[arg-type]
        object.__setattr__(step, "watch", watches[-1])
        return step

    watches: list[Watch | None] = []
    monkeypatch.setattr("attend_cases.plan_step", watched)
    looked = run(policy, lives, lambda: chunk)
    for a, b in zip(plain, looked, strict=True):
        assert torch.equal(a, b)
    for watch in watches:
        if watch is not None and watch.made:
            assert sorted(watch.made) == sorted(watch._left)
            numbers = [Quality(*each) for each in watch.found.tolist()]
            made += zip(watch.made, numbers, strict=True)
    whole = [quality for _, quality in made if quality.density == 1]
    assert whole and all(q.recall == pytest.approx(1) and q.error < 1e-5 and q.top1 == 1 for q in whole)
    partly = [quality for _, quality in made if quality.density < 1]
    assert {check.decode for check, quality in made if quality.density < 1} == {False, True}
    assert all(0.05 < q.recall < 0.999 and 1e-3 < q.error < 3 for q in partly)


def views_rows(step: Step, seq: int, length: int) -> Any:
    """The page tables of one sequence by group, as a `PageTable` has them."""
    pages = -(-length // 64)
    return [table[seq, :pages].numpy() for table in step.views._tables]


def test_a_look_without_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step goes on."""

    def full(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(second_look, "compare", full)
    case = make_case(**{"spans": ((0, 130),)})
    check = Check("p", False, "0", 0, 1, 0)
    watch = Watch([check], [])
    watch.look(0, (0, 1), case.q, case.kv, case.blocks, case.index, case.q, scale=1.0, softcap=0.0, sinks=None)
    assert watch.blind == (check,) and not watch.made


POLICY = AttentionPolicy(
    "mixed",
    (
        OperatingPoint("exact", ((DENSE,) * 2,) * 3),
        OperatingPoint("sparse", ((SPARSE, LATE), (SPARSE, SPARSE), (STREAMING, SPARSE))),
    ),
)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in (70, 400, 515)]


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_do_not_notice(checkpoint: Path, model: Model, ahead: bool) -> None:
    answers = []
    for rate in (0.0, 1.0):
        engine, records = make_engine(checkpoint, model=model, policy=POLICY, ahead=ahead, quality_sample_rate=rate)
        engine.start()
        try:
            asked = [ask(engine, p, point=point) for p in prompts() for point in POLICY.names]
            answers.append([answer.tokens() for answer in asked])
        finally:
            engine.stop(0.0)
        if rate == 0:
            assert not records.checks
    assert answers[0] == answers[1]
    assert {checked.check.point for checked in records.checks} == {"sparse"}
    assert {checked.phase for checked in records.checks} == {"prefill", "decode"}
    assert {checked.check.layers for checked in records.checks} == {"0", "1", "2"}
    for checked in records.checks:
        if checked.quality is None:
            assert (checked.check.layer, checked.check.head) == (2, 0)
        else:
            assert 0 < checked.quality.recall < 1 and checked.quality.error > 0 and checked.quality.density < 1


def test_a_step_that_is_looked_into_is_not_replayed(checkpoint: Path, model: Model) -> None:
    engine, records = make_engine(checkpoint, model=model, policy=POLICY, quality_sample_rate=0.5)
    executor, replayed = engine._loop.executor, []
    executor.graphs = SimpleNamespace(run=lambda tokens, unread: replayed.append(len(tokens)))  # type: ignore[assignment]
    engine.start()
    try:
        ask(engine, prompts()[2], point="sparse", max_tokens=101).tokens()
    finally:
        engine.stop(0.0)
    looked = len([1 for checked in records.checks if checked.phase == "decode" and checked.check.layers == "0"])
    assert 25 < len(replayed) < 75 and looked == 100 - len(replayed)


def checked(point: str, recall: float, error: float = 0.1, *, decode: bool = True) -> Checked:
    return Checked(Check(point, decode, "0", 0, 0, 0), Quality(recall, error, 1.0, 0.5))


def three_points(safer: str | None = "middle") -> AttentionPolicy:
    heads = ((SPARSE,),)
    return AttentionPolicy(
        "p",
        (
            OperatingPoint("fast", heads, safer),
            OperatingPoint("middle", heads, None),
            OperatingPoint("exact", ((DENSE,),)),
        ),
    )


def test_an_alarm_needs_checks_and_ends_when_its_bound_holds(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(Bounds(min_recall=0.8), three_points())
    with caplog.at_level(logging.WARNING):
        for n in range(LEAST):
            assert not any(guard.alarms().values()), n
            guard.note(checked("fast", 0.7))
            guard.note(Checked(checked("middle", 0).check, None))
            guard.note(checked("fast", 0.9, decode=False))
        assert guard.alarms() == {"fast": True, "middle": False, "exact": False}
        assert guard.instead_of("fast") == "fast", "falling back has to be allowed"
        for _ in range(2 * LEAST):
            guard.note(checked("fast", 0.95))
    assert not any(guard.alarms().values())
    assert [record.getMessage() for record in caplog.records] == [
        "quality of 'fast' in decode: mean recall 0.700, less than --quality-min-recall 0.8, over the last 32 checks",
        "quality of 'fast' in decode is within its bounds again",
    ]


def test_an_error_raises_the_alarm_too_and_numbers_that_are_good_do_not() -> None:
    guard = Guard(Bounds(max_error=0.2), three_points())
    for _ in range(LEAST):
        guard.note(checked("fast", 0.0, 0.19))
        guard.note(checked("middle", 1.0, 0.21))
    assert guard.alarms() == {"fast": False, "middle": True, "exact": False}
    free = Guard(Bounds(), three_points())
    for _ in range(LEAST):
        free.note(checked("fast", 0.0, 9.0))
    assert not any(free.alarms().values())


def test_points_rest_and_are_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    guard = Guard(Bounds(min_recall=0.8), three_points(), fall_back=True, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING):
        for _ in range(LEAST):
            guard.note(checked("fast", 0.7))
    assert "new requests for it use 'middle' for 10 minutes" in caplog.text
    assert [guard.instead_of(name) for name in guard.alarms()] == ["middle", "middle", "exact"]
    for _ in range(LEAST):
        guard.note(checked("middle", 0.7))
    assert [guard.instead_of(name) for name in guard.alarms()] == ["exact"] * 3
    assert guard.alarms() == {"fast": True, "middle": True, "exact": False}
    now[0] += REST_SECONDS
    assert [guard.instead_of(name) for name in guard.alarms()] == ["fast", "middle", "exact"]
    for n in range(LEAST):
        assert guard.instead_of("fast") == "fast", f"{n} new checks are too few"
        guard.note(checked("fast", 0.7))
    assert guard.instead_of("fast") == "middle"


def test_the_safer_point_is_the_one_named_or_the_dense_one() -> None:
    assert three_points().safer() == {"fast": "middle", "middle": "exact"}
    assert three_points(None).safer() == {"fast": "exact", "middle": "exact"}
    assert three_points("elsewhere").safer() == {"fast": "exact", "middle": "exact"}, "not served here"
    assert AttentionPolicy("p", three_points().points[:1]).safer() == {}


def test_requests_fall_back_while_the_server_runs(checkpoint: Path, model: Model) -> None:
    engine, records = make_engine(
        checkpoint, model=model, policy=POLICY, attention_point="sparse", quality_sample_rate=1.0,
        quality_min_recall=1.0, quality_fall_back=True,
    )  # fmt: skip
    engine.start()
    try:
        before = engine.fingerprint_of("sparse")
        first = ask(engine, prompts()[2], max_tokens=60)
        first.tokens()
        assert engine.stats().alarms == {"exact": False, "sparse": True}
        assert engine.fingerprint_of("sparse") != before and "@exact-" in engine.fingerprint
        for point in (None, "sparse"):
            ask(engine, prompts()[1], point=point).tokens()
    finally:
        engine.stop(0.0)
    assert [record.point for record in records.ended] == ["sparse", "exact", "exact"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quality_fall_back": True}, "--quality-fall-back needs a bound"),
        ({"quality_min_recall": 0.5, "quality_sample_rate": 0.0}, "Bounds of quality need checks"),
        ({"quality_sample_rate": 1.5}, "--quality-sample-rate must be at most 1"),
        ({"quality_max_error": float("nan")}, "--quality-max-error must be at least 0"),
    ],
)
def test_settings_that_do_nothing_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**fields)


def test_dense_is_a_selector_and_has_nothing_to_check() -> None:
    assert isinstance(DENSE.prefill, Dense)
    point = uniform("exact", DENSE, DENSE)
    step, tables, _ = a_step([Span(0, 640, 640)], [point], AttentionPolicy("p", (point,)))
    assert QualitySampler(1.0, (None,)).choose(step, tables, True) is None
