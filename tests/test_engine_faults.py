"""What goes wrong inside stays where it went wrong: a step, a choice, a client's callback; and what ends the engine."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Answer, Brake, Records, ask, load_tiny, make_engine, records_of, running_engine
from tiny_models import VOCAB, save_tiny_model
from torch import Tensor

from gossamer.attention.step import Step
from gossamer.kvcache.cache import KVCache, OutOfPages
from gossamer.server.config import ServerConfig
from gossamer.server.engine import loop
from gossamer.server.engine.choice import NOT_FINITE
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.model import Model
from gossamer.server.engine.request import Delta, Event, Progress, Request, SamplingParams, Started, Unavailable


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_tiny(ServerConfig(model=str(checkpoint), dtype="float32"))


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (length,), generator=generator).tolist()


def break_steps(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Step], bool]) -> None:
    """Let the model fail in the middle of the steps for which `breaks` is true."""
    forward = Model.forward

    def failing(model: Model, tokens: Tensor, positions: Tensor, step: Step, rows: Tensor) -> Tensor:
        logits = forward(model, tokens, positions, step, rows)
        if breaks(step):
            raise RuntimeError("injected")
        return logits

    monkeypatch.setattr(Model, "forward", failing)


def spoil(monkeypatch: pytest.MonkeyPatch, value: float, spoiled: Callable[[Step], list[int]]) -> None:
    """Write `value` into the logits of some of a step's sequences, by their place in the step."""
    forward = Model.forward

    def spoiling(model: Model, tokens: Tensor, positions: Tensor, step: Step, rows: Tensor) -> Tensor:
        logits = forward(model, tokens, positions, step, rows).clone()
        ends = torch.tensor([span.new for span in step.spans]).cumsum(0)
        for n in spoiled(step):
            own = (rows < ends[n]) & (rows >= ends[n] - step.spans[n].new)
            logits[own, 7] = value
        return logits

    monkeypatch.setattr(Model, "forward", spoiling)


def whole_again(engine: Engine) -> bool:
    stats = engine.stats()
    empty = (stats.running, stats.waiting, stats.pending_prefill_tokens) == (0, 0, 0)
    return empty and all(rule.pages_owned == 0 for rule in stats.rules)


def failed(answer: Answer, message: str, n: int = 1) -> bool:
    ends = [answer.finish(index) for index in range(n)]
    return all((end.finish_reason, end.message) == ("error", message) for end in ends)


def test_a_failed_step_ends_its_requests_only(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running_engine(checkpoint, model=model, max_num_seqs=3) as engine:
        right = {n: ask(engine, prompt(n, n)).tokens() for n in (20, 30)}
        # The fourth token of the request with 70 tokens, and with it whoever shares that step.
        break_steps(monkeypatch, lambda step: any(s.prompt == 70 and s.first == 72 for s in step.spans))
        brake = Brake(monkeypatch)
        first = [ask(engine, prompt(70), n=2), ask(engine, prompt(30, 30))]
        brake.wait()
        waiting = ask(engine, prompt(20, 20))
        brake.release()
        assert failed(first[0], loop.STEP_FAILED, 2) and failed(first[1], loop.STEP_FAILED)
        assert 0 < len(first[1].tokens()) < 16
        assert waiting.tokens() == right[20], "it was waiting when the step failed"
        assert engine.health().alive and engine.health().ready
        assert ask(engine, prompt(30, 30)).tokens() == right[30]
    assert "a step failed" in caplog.text and "injected" in caplog.text
    assert [r.finish_reason for r in records_of(engine).ended].count("error") == 3


def test_a_failed_prompt_leaves_nothing_to_reuse(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of a step that failed hold half a computation: nobody may find them as a prefix."""
    with running_engine(checkpoint, model=model) as engine, monkeypatch.context() as patch:
        break_steps(patch, lambda step: step.spans[0].first == 128)
        assert failed(ask(engine, prompt(300)), loop.STEP_FAILED)
        patch.undo()
        again = ask(engine, prompt(300))
        tokens = again.tokens()
        assert again.cached == 128
        engine.cache.clear_prefixes()
        assert ask(engine, prompt(300)).tokens() == tokens


def test_three_failures_in_a_row_end_the_engine(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = make_engine(checkpoint, model=model, max_num_seqs=1)
    engine.start()
    break_steps(monkeypatch, lambda step: step.spans[0].prompt == 66)
    for _ in range(2):  # two in a row are forgiven, as often as a step succeeds in between
        assert failed(ask(engine, prompt(66)), loop.STEP_FAILED)
        assert failed(ask(engine, prompt(66)), loop.STEP_FAILED)
        assert len(ask(engine, prompt(5)).tokens()) == 16
    brake = Brake(monkeypatch)
    bad = [ask(engine, prompt(66), n=n) for n in (1, 1, 1)]
    brake.wait()
    waiting = ask(engine, prompt(5), n=2)
    brake.release()
    assert all(failed(answer, loop.STEP_FAILED) for answer in bad)
    assert failed(waiting, loop.DEAD, 2) and waiting.tokens() == []
    engine._thread.join(60)
    health = engine.health()
    assert (health.alive, health.ready, health.reason) == (False, False, loop.DEAD)
    with pytest.raises(Unavailable):
        ask(engine, prompt(5))
    assert whole_again(engine)
    engine.stop(1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_one_choice(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    with running_engine(checkpoint, model=model) as engine:
        # a seed with no draw so near two tokens that the last bit, which may depend on the batch, decides
        right = ask(engine, prompt(40, 1), n=2, temperature=1.0, seed=5)
        tokens = [right.tokens(0), right.tokens(1)]

        def second_choice(step: Step) -> list[int]:
            places = [n for n, span in enumerate(step.spans) if span.prompt == 40 and span.first == 43]
            return places[1:]

        spoil(monkeypatch, value, second_choice)
        spoiled = ask(engine, prompt(40, 1), n=2, temperature=1.0, seed=5)
        other = ask(engine, prompt(41, 2))
        assert spoiled.tokens(0) == tokens[0] and spoiled.finish(0).finish_reason == "length"
        end = spoiled.finish(1)
        assert (end.finish_reason, end.message) == ("error", NOT_FINITE)
        assert spoiled.tokens(1) == tokens[1][:4]
        assert len(other.tokens()) == 16 and engine.health().alive


def test_prompts_that_cannot_be_scored_fail_alone(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_engine(checkpoint, model=model) as engine:
        spoil(monkeypatch, float("nan"), lambda step: [n for n, span in enumerate(step.spans) if span.prompt == 90])
        bad = ask(engine, prompt(90), prompt_logprobs=1, n=2)
        good = ask(engine, prompt(30), prompt_logprobs=1)
        assert failed(bad, NOT_FINITE, 2) and not any(isinstance(event, Started) for event in bad.events)
        assert len(good.tokens()) == 16 and engine.health().alive


@pytest.mark.parametrize("kind", [Progress, Started, Delta])
def test_a_callback_that_raises_loses_its_request_only(
    checkpoint: Path,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Event],
) -> None:
    seen: list[Event] = []

    def publish(event: Event) -> None:
        seen.append(event)
        if isinstance(event, kind):
            raise RuntimeError("the client's fault")

    with running_engine(checkpoint, model=model, max_num_batched_tokens=64) as engine:
        brake = Brake(monkeypatch)
        other = ask(engine, prompt(50))
        brake.wait()
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        engine.submit(Request(id="bad", prompt=prompt(200), params=params, n=3), publish)
        brake.release()
        assert len(other.tokens()) == 16
        assert len(ask(engine, prompt(20)).tokens()) == 16
        assert engine.health().ready and whole_again(engine)
    assert isinstance(seen[-1], kind) and sum(isinstance(event, kind) for event in seen) == 1
    assert "bad failed" in caplog.text.replace("request ", "") and "the client's fault" in caplog.text
    assert [r.finish_reason for r in records_of(engine).ended].count("abort") == 3


def test_a_callback_that_raises_at_the_end(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the engine gives up its requests, one bad callback does not keep the others from their last delta."""

    def publish(event: Event) -> None:
        raise RuntimeError("the client's fault")

    engine, _ = make_engine(checkpoint, model=model, max_num_seqs=1)
    engine.start()
    brake = Brake(monkeypatch)
    running = ask(engine, prompt(10), max_tokens=1000)
    brake.wait()
    params = SamplingParams(max_tokens=5, temperature=0.0)
    engine.submit(Request(id="bad", prompt=prompt(20), params=params, n=2), publish)
    last = ask(engine, prompt(5))
    engine._loop.inbox.put(loop.Stop(0.0))
    brake.release()
    engine.stop(0.0)
    assert failed(running, loop.SHUT_DOWN) and failed(last, loop.SHUT_DOWN) and whole_again(engine)


def test_an_observer_that_raises_harms_nobody(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And is heard of once for each kind of news, not with every token."""

    def fail(records: Records, news: object) -> None:
        raise RuntimeError("out of room for numbers")

    kinds = ("step", "first_token", "inter_token", "finished")
    for kind in kinds:
        monkeypatch.setattr(Records, kind, fail)
    with running_engine(checkpoint, model=model) as engine:
        for _ in range(2):
            assert len(ask(engine, prompt(50)).tokens()) == 16
        assert engine.health().ready
    assert caplog.text.count("an observer of the engine failed") == len(kinds)


def test_a_fault_outside_a_step_ends_the_engine(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Books that cannot be trusted any more: everybody is told, and a supervisor sees it."""
    engine, _ = make_engine(checkpoint, model=model, max_num_seqs=2)
    engine.start()
    brake = Brake(monkeypatch)
    answers = [ask(engine, prompt(60 + n), max_tokens=500, n=2) for n in range(2)]
    brake.wait()

    def no_pages(cache: KVCache, *_: Any) -> None:
        raise OutOfPages("injected")

    monkeypatch.setattr(KVCache, "grow", no_pages)
    brake.release()
    assert all(failed(answer, loop.DEAD, 2) for answer in answers)
    engine._thread.join(60)
    assert engine.health().reason == loop.DEAD and not engine.health().alive
    assert "the engine's loop failed" in caplog.text and "injected" in caplog.text
    assert whole_again(engine)
    engine.cache.audit()


def test_running_out_of_pages_is_nobodys_fault(checkpoint: Path, model: Model) -> None:
    """Far more work than pages: everyone is answered, and right, with nothing but waiting and recomputation."""
    pages = 9 * 3 * 2 * 2 * 64 * 32 * 4
    tight: dict[str, Any] = {"kv_cache_memory": pages, "max_model_len": 320, "max_num_batched_tokens": 100}
    with running_engine(checkpoint, model=model) as engine:
        right = [ask(engine, prompt(50 + 10 * n, n), max_tokens=30).tokens() for n in range(10)]
    with running_engine(checkpoint, model=model, **tight) as engine:
        answers = [ask(engine, prompt(50 + 10 * n, n), max_tokens=30) for n in range(10)]
        assert [answer.tokens() for answer in answers] == right
        assert engine.stats().preemptions > 0


def test_a_hung_step_is_reported(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes a minute, or ten times what was predicted, is said to hang; when it ends, all is well."""
    later = 0.0
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later))
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model) as engine:
        assert engine.stats().heartbeat_age == 0.0
        answer = ask(engine, prompt(10))
        brake.wait()
        assert engine.health().alive
        later = loop.HUNG_SECONDS + 1.0
        health = engine.health()
        assert not health.alive and not health.ready and "has been running for 6" in health.reason
        assert engine.stats().heartbeat_age > loop.HUNG_SECONDS
        engine._loop._step_predicted = loop.HUNG_SECONDS
        assert engine.health().alive, "it was predicted to take long"
        later = 10 * loop.HUNG_SECONDS + 1.0
        assert not engine.health().alive
        brake.release()
        assert len(answer.tokens()) == 16
        assert engine.health().alive and engine.health().ready
