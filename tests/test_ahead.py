"""Each step launched before the one before it is read, as on a GPU: nobody notices, and faults stay where they are.

On a CPU a launch returns when all is computed, so the order of things is the same and nothing is hidden by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import pytest
import test_engine
import test_engine_faults
import torch
from engines import Answer, Brake, ask, make_engine, records_of, running_engine
from test_engine import prompt
from test_engine_faults import break_steps, failed, whole_again

from gossamer.attention.reads import SpanReads
from gossamer.server.engine import loop
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.executor import Executor, Launched, Outcome
from gossamer.server.engine.loop import Loop, Stop, Submit
from gossamer.server.engine.model import Model
from gossamer.server.engine.request import AttentionUse, Request, SamplingParams, Started
from gossamer.server.engine.sampler import Sampled
from gossamer.server.engine.scheduler import Part
from gossamer.server.engine.transfer import CopyOut, Unread

BOTH = pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])

reference = test_engine.reference


@pytest.fixture(autouse=True)
def launched_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine here launches ahead unless told otherwise."""
    plain = engines.assemble

    def assemble(*given: Any, ahead: bool | None, **options: Any) -> Engine:
        return plain(*given, ahead=True if ahead is None else ahead, **options)

    monkeypatch.setattr(engines, "assemble", assemble)


# What holds for every engine, once more

test_generated_pages_are_reused_too = test_engine.test_generated_pages_are_reused_too
test_seeds_do_not_depend_on_batch_mates = test_engine.test_seeds_do_not_depend_on_batch_mates
test_stop_strings = test_engine.test_stop_strings
test_stop_tokens = test_engine.test_stop_tokens
test_end_of_sequence = test_engine.test_end_of_sequence
test_longest_sequence = test_engine.test_longest_sequence
test_logprobs_of_generated_tokens = test_engine.test_logprobs_of_generated_tokens
test_logprobs_of_the_prompt = test_engine.test_logprobs_of_the_prompt
test_cancel_in_the_middle_of_a_prompt = test_engine.test_cancel_in_the_middle_of_a_prompt
test_cancel_several_choices = test_engine.test_cancel_several_choices
test_draining = test_engine.test_draining
test_stopping_at_once = test_engine.test_stopping_at_once
test_a_failed_step_ends_its_requests_only = test_engine_faults.test_a_failed_step_ends_its_requests_only
test_a_failed_prompt_leaves_nothing_to_reuse = test_engine_faults.test_a_failed_prompt_leaves_nothing_to_reuse
test_three_failures_in_a_row_end_the_engine = test_engine_faults.test_three_failures_in_a_row_end_the_engine
test_logits_that_are_not_finite = test_engine_faults.test_logits_that_are_not_finite_fail_one_choice
test_prompts_that_cannot_be_scored_fail_alone = test_engine_faults.test_prompts_that_cannot_be_scored_fail_alone
test_a_callback_that_raises = test_engine_faults.test_a_callback_that_raises_loses_its_request_only
test_a_fault_outside_a_step_ends_the_engine = test_engine_faults.test_a_fault_outside_a_step_ends_the_engine


# The same answers


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1, "logprobs": 2},
    {"temperature": 1.0, "seed": 2, "top_p": 0.9, "top_k": 40, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.8, "min_tokens": 5, "ignore_eos": False, "logit_bias": ((1, 4.0),)},
    {"temperature": 1.5, "seed": 3, "ignore_eos": False, "logit_bias": ((1, 6.0),), "n": 3},
    {"max_tokens": 0},
    {"max_tokens": 1, "prompt_logprobs": 1},
    {"temperature": 2.0, "seed": 4, "stop": ("a", "e", "i", "o", "u"), "prompt_logprobs": 0, "n": 2},
    {"temperature": 1.0, "seed": 5, "stop_token_ids": tuple(range(4, 60))},
    {"max_tokens": 80, "frequency_penalty": 2.0, "temperature": 1.0, "seed": 6, "min_tokens": 70},
]


def told(answer: Answer) -> tuple[list[Any], list[float]]:
    """All that a client sees of a request: what must be the same, and floats, which neighbours in a batch may touch."""
    ends = [answer.finish(index) for index in range(answer.n)]
    (started,) = (event for event in answer.events if isinstance(event, Started))
    scores = [score for score in started.prompt_logprobs or () if score is not None]
    found: list[Any] = [started.cached_tokens]
    for index, end in enumerate(ends):
        found += [answer.tokens(index), answer.text(index), end.finish_reason, end.stop_reason, end.attention]
        scores += [score for delta in answer.deltas(index) for score in delta.logprobs]
    found.append([(score.token, *(token for token, _ in score.top)) for score in scores])
    return found, [value for score in scores for value in (score.logprob, *(each for _, each in score.top))]


@pytest.mark.parametrize("tight", [False, True], ids=["room", "preempted"])
def test_nobody_notices(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch, tight: bool) -> None:
    """Requests of all kinds, with prompts in chunks beside answers, and where pages are short."""
    pages = 9 * 3 * 2 * 2 * 64 * 32 * 4
    options: dict[str, Any] = {"model": model, "max_num_batched_tokens": 100}
    if tight:
        options |= {"kv_cache_memory": pages, "max_model_len": 320, "enable_prefix_caching": False}
    answered = []
    for ahead in (False, True):
        with running_engine(checkpoint, ahead=ahead, **options) as engine, monkeypatch.context() as patch:
            brake = Brake(patch)
            first = ask(engine, prompt(200, 99), max_tokens=60)
            brake.wait()
            asked = [first, *(ask(engine, prompt(50 + 13 * i, i), **kind) for i, kind in enumerate(KINDS))]
            brake.release()
            answered.append([told(answer) for answer in asked])
            records = records_of(engine)
            tokens = sum(len(answer.tokens(index)) for answer in asked for index in range(answer.n))
            assert (engine.stats().preemptions > 0) is tight
        assert sum(step.generated_tokens for step in records.steps) == tokens
        assert sum(record.generated_tokens for record in records.ended) == tokens
        if not tight:
            prompts = sum(record.prompt_tokens - record.cached_tokens for record in records.ended)
            assert sum(step.prompt_tokens for step in records.steps) == prompts
    for (mine, values), (theirs, others) in zip(*answered, strict=True):
        if tight:  # what was computed again was read again
            mine, theirs = ([each for each in one if not isinstance(each, AttentionUse)] for one in (mine, theirs))
        assert mine == theirs and values == pytest.approx(others, abs=1e-4)


# What is launched when


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is launched (+) and collected (-), by the steps' numbers."""
    seen, numbers = list[str](), dict[int, int]()
    launch, collect = Executor.launch, Executor.collect

    def launching(executor: Executor, parts: list[Part], before: Launched | None) -> Launched:
        found = launch(executor, parts, before)
        numbers[id(found)] = len(numbers)
        keep.append(found)
        seen.append(f"+{numbers[id(found)]}")
        return found

    def collecting(executor: Executor, launched: Launched) -> Outcome:
        seen.append(f"-{numbers[id(launched)]}")
        return collect(executor, launched)

    keep = list[Launched]()  # so that no two have one id
    with monkeypatch.context() as patch:
        patch.setattr(Executor, "launch", launching)
        patch.setattr(Executor, "collect", collecting)
        yield seen


def test_a_step_is_launched_before_the_one_before_is_read(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none behind the last token that was asked for."""
    for ahead, order in ((True, "+0 +1 -0 +2 -1 +3 -2 -3"), (False, "+0 -0 +1 -1 +2 -2 +3 -3")):
        with watched(monkeypatch) as seen, running_engine(checkpoint, model=model, ahead=ahead) as engine:
            assert len(ask(engine, prompt(20), max_tokens=4).tokens()) == 4
        assert " ".join(seen) == order


@BOTH
def test_what_is_computed_behind_the_end_does_not_count(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """An end that nobody could foresee: the step behind it begins another page for it, and nobody hears of that."""
    launch, computed = Executor.launch, list[Part]()

    def counting(executor: Executor, parts: list[Part], before: Launched | None) -> Launched:
        computed.extend(parts)
        return launch(executor, parts, before)

    with running_engine(checkpoint, model=model) as engine:
        tokens = ask(engine, prompt(127), max_tokens=2).tokens()
    monkeypatch.setattr(Executor, "launch", counting)
    with running_engine(checkpoint, model=model, ahead=ahead) as engine, monkeypatch.context() as patch:
        brake = Brake(patch)
        other = ask(engine, prompt(20), max_tokens=8)
        brake.wait()
        answer = ask(engine, prompt(127), stop_token_ids=(tokens[1],))
        brake.release()
        assert answer.tokens() == tokens and answer.finish().stop_reason == tokens[1]
        assert len(other.tokens()) == 8
        use, rule = answer.finish().attention, engine.stats().rules[0]
    assert use is not None and use.kv_bytes == 2 * rule.bytes_per_page
    assert use.decode_possible == 3 * 2 * 2 and use.decode_read == use.decode_possible
    assert len(computed) == 8 + 2 + ahead
    records = records_of(engine)
    assert sum(step.sequences for step in records.steps) == sum(step.generated_tokens for step in records.steps) == 10
    assert [record.generated_tokens for record in records.ended] == [2, 8]


def test_a_step_for_nobody_is_not_recorded(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen, running_engine(checkpoint, model=model) as engine:
        token = ask(engine, prompt(20), max_tokens=1).tokens()[0]
        ask(engine, prompt(20), stop_token_ids=(token,)).tokens()
    assert " ".join(seen) == "+0 -0 +1 +2 -1 -2" and len(records_of(engine).steps) == 2


def test_cancelled_with_a_step_under_way(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages go to another request while the step still uses them, as far as the host knows."""
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, enable_prefix_caching=False) as engine:
        right = ask(engine, prompt(150, 1), max_tokens=8)
        brake.wait()
        brake.release()
        right.tokens()
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, enable_prefix_caching=False) as engine:
        answer = ask(engine, prompt(100), max_tokens=500)
        brake.wait()
        brake.step(4)
        assert answer.ticket is not None
        answer.ticket.cancel()
        other = ask(engine, prompt(150, 1), max_tokens=8)
        brake.step()
        published = len(answer.events)
        brake.release()
        assert other.tokens() == right.tokens()
        assert len(answer.events) == published and not answer.done.is_set()
    assert [record.finish_reason for record in records_of(engine).ended] == ["abort", "length"]


def test_tokens_are_taken_to_where_they_belong() -> None:
    chosen = torch.tensor([10, 11, 12])
    for places, at, expected in (
        ([0, 1, 2], [0, 1, 2], [10, 11, 12, 0, 0]),
        ([2, 0, 1], [0, 1, 2], [12, 10, 11, 0, 0]),
        ([0, 1, 2], [1, 2, 4], [0, 10, 11, 0, 12]),
        ([1], [3], [0, 0, 0, 11, 0]),
    ):
        tokens = torch.zeros(5, dtype=torch.int64)
        Unread(chosen, places, at).put(tokens)
        assert tokens.tolist() == expected


def test_a_copy_holds_what_was_there_when_it_was_made() -> None:
    """Recorded steps write their results to the same memory each time."""
    whole, real = torch.tensor([[2**53 - 1, 7]]), torch.tensor([0.1, -3e38])
    copy = CopyOut({"whole": whole, "real": real, "none": torch.zeros(0, 4)})
    whole.zero_()
    alone = torch.ones(3, dtype=torch.float64)
    other = CopyOut({True: alone})
    alone.zero_()
    found = copy.read()
    assert found["whole"].tolist() == [[2**53 - 1, 7]] and found["real"].float().tolist() == real.tolist()
    assert found["none"].shape == (0, 4) and other.read()[True].tolist() == [1.0] * 3


# What breaks


@BOTH
def test_what_came_before_a_failed_step_is_published(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    with running_engine(checkpoint, model=model, ahead=ahead) as engine:
        right = ask(engine, prompt(70)).tokens()
        with monkeypatch.context() as patch:
            break_steps(patch, lambda step: step.spans[0].first == 74)
            answer = ask(engine, prompt(70))
            assert failed(answer, loop.STEP_FAILED) and answer.tokens() == right[:5]
            ending = ask(engine, prompt(70), stop_token_ids=(right[4],))
            assert right[4] not in right[:4], "this ends with the fifth token, and the step behind it fails for nobody"
            assert ending.tokens() == right[:5] and ending.finish().finish_reason == "stop"
        assert ask(engine, prompt(70)).tokens() == right
    assert [r.finish_reason for r in records_of(engine).ended] == ["length", "error", "stop", "length"]


@BOTH
def test_results_that_do_not_arrive(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Requests of that step end, nothing it may have spoilt is reused, and the engine goes on; unless it goes on."""
    read, lost = CopyOut.read, SimpleNamespace(left=0)

    def losing(copy: CopyOut) -> dict[object, Any]:
        lost.left -= 1
        if lost.left >= 0:
            raise RuntimeError("lost")
        return read(copy)

    monkeypatch.setattr(CopyOut, "read", losing)
    engine, _ = make_engine(checkpoint, model=model, ahead=ahead)
    engine.start()
    right = ask(engine, prompt(200)).tokens()
    lost.left = 1
    assert failed(ask(engine, prompt(200)), loop.STEP_FAILED) and engine.health().alive
    again = ask(engine, prompt(200))
    assert again.tokens() == right and again.cached == 0
    lost.left = 1000
    for _ in range(loop.MOST_FAILURES):
        answer = ask(engine, prompt(10))
        assert answer.finish().finish_reason == "error"
        if not engine.health().alive:
            break
    engine._thread.join(60)
    assert engine.health().reason == loop.DEAD and whole_again(engine)
    engine.stop(0.0)


# What the clock says


class FakeDevice:
    """Takes one second to be given a step, ten to compute it, one step after another."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, 0.0

    def launch(self, parts: list[Part], before: Any) -> Any:
        self.now += 1.0
        self.done = max(self.done, self.now) + 10.0
        return SimpleNamespace(parts=parts, done=self.done, model_seconds=1.0, select_seconds=0.0, attend_seconds=0.0)

    def collect(self, launched: Any) -> Outcome:
        self.now = max(self.now, launched.done)
        nothing = SpanReads(0.0, 0.0, 0.0, 0.0)
        sampled = {part.sequence: Sampled(5, None, True) for part in launched.parts}
        return Outcome(sampled, (nothing,) * len(launched.parts))


def with_one_request(engine: Engine, device: FakeDevice) -> tuple[Loop, Answer]:
    """The loop of an engine that is not started, on a device of its own, and what comes of a prompt of 300 tokens."""
    turns, answer = engine._loop, Answer(1)
    turns.executor = device  # type: ignore[assignment]
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    request, point = Request(id="one", prompt=prompt(300), params=params), engine.point(engine.default_point)
    flight = engine._in_flight(request, point, 1, answer.publish)
    flight.arrived = device.now
    turns.load.enter(1, 300)
    turns.inbox.put(Submit(flight))
    return turns, answer


def test_stopping_publishes_what_is_under_way(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: device.now))
    engine, records = make_engine(checkpoint, model=model, max_num_batched_tokens=512)
    turns, answer = with_one_request(engine, device)
    turns.inbox.put(Stop(5.0))  # while the first step runs
    turns.run()
    assert len(answer.tokens()) == len(records.steps) == 2 and device.now == 21.0
    assert failed(answer, loop.SHUT_DOWN) and whole_again(engine)


def test_steps_are_timed_from_one_completion_to_the_next(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: device.now))
    engine, records = make_engine(checkpoint, model=model, max_num_batched_tokens=512)
    turns, answer = with_one_request(engine, device)
    pace = turns.scheduler.pace
    pace.seconds_per_unit = 0.01
    for _ in range(2):
        turns._receive()
        turns._turn()
    assert (device.now, turns.heartbeat_age(), len(records.steps)) == (11.0, 0.0, 1)
    assert pace.seconds_per_unit == pytest.approx(0.01 + 0.2 * (11.0 / pace.work(0, 300) - 0.01))
    device.now += 3.0
    assert turns.heartbeat_age() == 3.0
    assert turns._step_predicted == 0.01 * pace.work(300, 1)
    device.now += loop.HUNG_SECONDS
    assert not turns.liveness()[0]
    device.now = 14.0
    while not answer.done.is_set():
        turns._receive()
        turns._turn()
    assert [step.seconds for step in records.steps] == [11.0, 10.0, 10.0, 10.0] and device.now == 41.0
    engine.stop(0.0)
