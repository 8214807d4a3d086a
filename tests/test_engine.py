"""The engine from submit to the last delta: batches, chunks, reuse, sampling, stops, limits, cancelling, draining."""

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Answer, Brake, ask, load_tiny, make_engine, records_of, running_engine
from tiny_models import VOCAB, save_tiny_model
from transformers import AutoModelForCausalLM

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import SinkRecent
from gossamer.kvcache.retention import KeepAll
from gossamer.server.config import ServerConfig
from gossamer.server.engine.engine import Engine, Ticket
from gossamer.server.engine.loop import SHUT_DOWN, Stop
from gossamer.server.engine.model import Model
from gossamer.server.engine.request import (
    InvalidRequest,
    Overloaded,
    Progress,
    Started,
    TokenLogprob,
    Unavailable,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_tiny(ServerConfig(model=str(checkpoint), dtype="float32"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (length,), generator=generator).tolist()


def logprobs_of(reference: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[len(tokens), vocabulary]: row i is the distribution after tokens[: i + 1]."""
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0].double().log_softmax(-1)  # type: ignore[no-any-return]


def check_scores(scores: Sequence[TokenLogprob], right: torch.Tensor, tokens: Sequence[int], top: int) -> None:
    assert [score.token for score in scores] == list(tokens)
    for score, row in zip(scores, right, strict=True):
        assert math.isclose(score.logprob, float(row[score.token]), abs_tol=2e-4)
        best = row.topk(top)
        assert [token for token, _ in score.top] == best.indices.tolist()
        for (token, logprob), value in zip(score.top, best.values.tolist(), strict=True):
            assert math.isclose(logprob, value, abs_tol=2e-4)
            assert token != score.token or logprob == score.logprob


def held(engine: Engine) -> int:
    return sum(rule.pages_owned for rule in engine.stats().rules)


def only_letters(engine: Engine) -> dict[str, Any]:
    """Sampling parameters that make for answers of lower-case letters."""
    ids = engine.tokenizer.encode(LETTERS, add_special_tokens=False)
    return {"temperature": 1.0, "seed": 3, "logit_bias": tuple((token, 100.0) for token in ids)}


# Steps


def test_prompts_and_generated_tokens_share_steps(
    checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, max_num_batched_tokens=128) as engine:
        first = ask(engine, prompt(20), max_tokens=30)
        brake.wait()
        second = ask(engine, prompt(300, 1), max_tokens=5)
        brake.release()
        first.tokens()
        second.tokens()
    steps = records_of(engine).steps
    assert [(s.prompt_tokens, s.generated_tokens, s.sequences) for s in steps[:5]] == [
        (20, 1, 1),
        (64, 1, 2),
        (64, 1, 2),
        (64, 1, 2),
        (108, 2, 2),
    ]
    assert sum(step.prompt_tokens for step in steps) == 320
    assert sum(step.generated_tokens for step in steps) == 35
    assert all(0 < step.model_seconds <= step.seconds for step in steps)


def test_long_prompts_report_their_progress(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model, max_num_batched_tokens=128) as engine:
        answer = ask(engine, prompt(300), max_tokens=2)
        answer.tokens()
    assert answer.events[:3] == [
        Progress(computed=128, total=300),
        Progress(computed=256, total=300),
        Started(cached_tokens=0),
    ]
    assert [len(delta.tokens) for delta in answer.deltas()] == [1, 1]


def test_records_of_ended_choices(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model) as engine:
        ask(engine, prompt(100), max_tokens=3).tokens()
        ask(engine, prompt(100), max_tokens=4, n=2).tokens()
    one, *two = records_of(engine).ended
    assert (one.finish_reason, one.prompt_tokens, one.cached_tokens, one.generated_tokens) == ("length", 100, 0, 3)
    assert [(r.cached_tokens, r.generated_tokens, r.max_tokens, r.n) for r in two] == [(64, 4, 4, 2)] * 2
    for record in (one, *two):
        assert record.point == "exact" and record.preemptions == 0
        assert min(record.queued, record.prefill, record.decode) >= 0
        assert record.queued + record.prefill + record.decode <= record.end_to_end + 1e-6


# Reuse of prefixes


def test_prefixes_are_reused_in_whole_pages(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model) as engine:
        asked = prompt(200)
        first = ask(engine, asked)
        answer = first.tokens()
        again = ask(engine, asked)
        assert again.tokens() == answer
        fork = ask(engine, asked[:130] + prompt(70, 1))
        fork.tokens()
        longer = ask(engine, asked + answer + prompt(60, 2))
        longer.tokens()
        whole = ask(engine, asked[:192])
        whole.tokens()
        assert [a.cached for a in (first, again, fork, longer)] == [0, 192, 128, 192]
        assert whole.cached == 128, "one token at least has to be computed"
        stats = engine.stats()
        assert stats.prefix_queried_tokens == 200 + 200 + 200 + 276 + 192
        assert stats.prefix_hit_tokens == 192 + 128 + 192 + 128


def test_generated_pages_are_reused_too(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model) as engine:
        asked = prompt(100)
        answer = ask(engine, asked, max_tokens=40).tokens()
        longer = ask(engine, asked + answer + prompt(10, 1))
        with running_engine(checkpoint, model=model) as fresh:
            assert ask(fresh, asked + answer + prompt(10, 1)).tokens() == longer.tokens()
        assert longer.cached == 128


def test_salts_and_operating_points_do_not_share(checkpoint: Path, model: Model) -> None:
    sparse = HeadPolicy(SinkRecent(64, 64), SinkRecent(64, 64), KeepAll())
    heads = {"exact": DENSE, "fast": sparse, "same": DENSE}
    policy = AttentionPolicy("x", tuple(OperatingPoint(name, ((head,) * 2,) * 3) for name, head in heads.items()))
    asked = prompt(300)
    with running_engine(checkpoint, model=model, policy=policy) as engine:
        exact = ask(engine, asked).tokens()
        for new in ({"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "\ud800"}, {"point": "fast"}):
            assert [(a := ask(engine, asked, **new)).tokens() and a.cached for _ in range(2)] == [0, 256]
        fast = ask(engine, asked, point="fast").tokens()
        same = ask(engine, asked, point="same")
        assert same.tokens() == exact != fast
        assert same.cached == 256, "points that compute the same may share"
        assert engine.fingerprint_of("same").split("-")[-1] == engine.fingerprint.split("-")[-1]
        assert engine.fingerprint_of("fast").split("-")[-1] != engine.fingerprint.split("-")[-1]


def test_prefix_caching_can_be_turned_off(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model, enable_prefix_caching=False) as engine:
        answers = [ask(engine, prompt(200), n=2) for _ in range(2)]
        assert answers[0].tokens() == answers[0].tokens(1) == answers[1].tokens() == answers[1].tokens(1)
        assert [answer.cached for answer in answers] == [0, 0]
        assert engine.stats().prefix_hit_tokens == 0


# Choices and seeds


def test_choices_share_their_prompt_and_differ(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model) as engine:
        asked = prompt(150)
        many = ask(engine, asked, n=4, temperature=1.0, seed=11)
        tokens = [many.tokens(index) for index in range(4)]
        assert len({tuple(one) for one in tokens}) == 4
        assert sum(isinstance(event, Started) for event in many.events) == 1 and many.cached == 0
        assert engine.stats().prefix_hit_tokens == 3 * 128
        again = ask(engine, asked, n=4, temperature=1.0, seed=11)
        assert [again.tokens(index) for index in range(4)] == tokens
        assert ask(engine, asked, temperature=1.0, seed=11).tokens() == tokens[0]
        assert ask(engine, asked, temperature=1.0, seed=12).tokens() not in tokens
        unseeded = [ask(engine, asked, temperature=1.0).tokens() for _ in range(2)]
        assert unseeded[0] != unseeded[1]


def test_seeds_do_not_depend_on_batch_mates(checkpoint: Path, model: Model) -> None:
    """The same request, alone and in crowds of several kinds, with chunks of other lengths, and preempted."""
    wanted = {"temperature": 1.0, "seed": 5, "max_tokens": 24, "top_p": 0.95, "presence_penalty": 0.5}
    with running_engine(checkpoint, model=model, enable_prefix_caching=False) as engine:
        alone = ask(engine, prompt(115), **wanted).tokens()
        for crowd in range(2):
            others = [ask(engine, prompt(30 + 40 * i, 1 + i), temperature=1.0, seed=i) for i in range(3 + crowd)]
            mine = ask(engine, prompt(115), n=1 + crowd, **wanted)
            assert mine.tokens() == alone
            assert all(len(other.tokens()) == 16 for other in others)
    pages = 8 * 3 * 2 * 2 * 64 * 32 * 4  # eight pages in each of three layers
    tight: dict[str, Any] = {"kv_cache_memory": pages, "max_model_len": 256, "max_num_batched_tokens": 48}
    with running_engine(checkpoint, model=model, enable_prefix_caching=False, **tight) as engine:
        crowd_of = [ask(engine, prompt(115), **wanted) for _ in range(8)]
        assert [one.tokens() for one in crowd_of] == [alone] * 8
        assert engine.stats().preemptions > 0


# How answers end


def test_stop_strings(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model) as engine:
        letters = only_letters(engine)
        text = ask(engine, prompt(20), max_tokens=40, **letters).text()
        assert len(text) == 40 and set(text) <= set(LETTERS)
        stop = text[17:20]
        at = text.index(stop)
        cut = ask(engine, prompt(20), max_tokens=40, stop=("§§", stop), **letters)
        assert (cut.text(), cut.finish().finish_reason, cut.finish().stop_reason) == (text[:at], "stop", stop)
        assert len(cut.tokens()) == at + len(stop)
        kept = ask(engine, prompt(20), max_tokens=40, stop=(stop,), include_stop_str_in_output=True, **letters)
        assert kept.text() == text[: at + len(stop)]
        late = ask(engine, prompt(20), max_tokens=40, stop=(stop,), min_tokens=at + len(stop) + 1, **letters)
        assert late.text()[: at + len(stop)] == text[: at + len(stop)], "it does not count before min_tokens"
        # What could become a stop string is held back, and comes with the end.
        held_back = ask(engine, prompt(20), max_tokens=19, stop=(text[17:19] + "~",), **letters)
        assert held_back.text() == text[:19] and held_back.finish().finish_reason == "length"
        assert held_back.finish().text == text[17:19]


def test_stop_tokens(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model) as engine:
        letters = only_letters(engine)
        whole = ask(engine, prompt(20), max_tokens=40, **letters)
        tokens, text = whole.tokens(), whole.text()
        stop = tokens[9]
        at = tokens.index(stop)
        cut = ask(engine, prompt(20), max_tokens=40, stop_token_ids=(stop,), **letters)
        assert (cut.tokens(), cut.text()) == (tokens[: at + 1], text[:at])
        assert (cut.finish().finish_reason, cut.finish().stop_reason) == ("stop", stop)
        kept = ask(
            engine, prompt(20), max_tokens=40, stop_token_ids=(stop,), include_stop_str_in_output=True, **letters
        )
        assert kept.text() == text[: at + 1]
        late = ask(engine, prompt(20), max_tokens=40, min_tokens=at + 3, stop_token_ids=(stop,), **letters)
        assert stop not in late.tokens()[: at + 3] and len(late.tokens()) > at + 3


def test_end_of_sequence(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model) as engine:
        ends = {"logit_bias": ((1, 100.0),), "ignore_eos": False}
        once = ask(engine, prompt(20), **ends)
        assert (once.tokens(), once.text()) == ([1], "")
        assert (once.finish().finish_reason, once.finish().stop_reason) == ("stop", None)
        late = ask(engine, prompt(20), min_tokens=5, **ends)
        assert len(late.tokens()) == 6 and late.tokens().index(1) == 5
        full = ask(engine, prompt(20), min_tokens=7, max_tokens=7, **ends)
        assert 1 not in full.tokens() and full.finish().finish_reason == "length"
        ignored = ask(engine, prompt(20), logit_bias=((1, 100.0),), ignore_eos=True)
        assert ignored.tokens() == [1] * 16 and ignored.finish().finish_reason == "length"


def test_longest_sequence(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model, max_model_len=100) as engine:
        full = ask(engine, prompt(90), max_tokens=10)
        assert len(full.tokens()) == 10 and full.finish().finish_reason == "length"


# Log-probabilities


def test_logprobs_of_generated_tokens(checkpoint: Path, model: Model, reference: Any) -> None:
    asked = prompt(70)
    with running_engine(checkpoint, model=model) as engine:
        for params in ({}, {"temperature": 1.0, "seed": 1, "top_k": 5, "logit_bias": ((9, 3.0),)}):
            answer = ask(engine, asked, max_tokens=8, logprobs=4, **params)
            tokens = answer.tokens()
            scores = [score for delta in answer.deltas() for score in delta.logprobs]
            check_scores(scores, logprobs_of(reference, asked + tokens)[69:-1], tokens, 4)
        plain = ask(engine, asked, logprobs=0)
        assert plain.tokens() and all(score.top == () for delta in plain.deltas() for score in delta.logprobs)
        none = ask(engine, asked)
        assert none.tokens() and not any(delta.logprobs for delta in none.deltas())


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_logprobs_of_the_prompt(checkpoint: Path, model: Model, reference: Any, max_tokens: int) -> None:
    """Whatever the chunks; pages that are cached already do not help, for they have no logits, and help others."""
    asked = prompt(300)
    right = logprobs_of(reference, asked)[:-1]
    with running_engine(checkpoint, model=model, max_num_batched_tokens=100) as engine:
        for n in (1, 2):
            answer = ask(engine, asked, max_tokens=max_tokens, prompt_logprobs=3, n=n)
            tokens = [answer.tokens(index) for index in range(n)]
            assert [len(one) for one in tokens] == [max_tokens] * n and tokens[0] == tokens[-1]
            assert all(answer.finish(index).finish_reason == "length" for index in range(n))
            (started,) = [event for event in answer.events if isinstance(event, Started)]
            assert started.cached_tokens == 0 and started.prompt_logprobs is not None
            nothing, *scores = started.prompt_logprobs
            assert nothing is None
            check_scores([score for score in scores if score is not None], right, asked[1:], 3)
        plain = ask(engine, asked, max_tokens=max_tokens)
        assert plain.tokens() == tokens[0] and plain.cached == 256


def test_logprobs_of_a_prompt_survive_preemption(checkpoint: Path, model: Model, reference: Any) -> None:
    pages = 10 * 3 * 2 * 2 * 64 * 32 * 4
    tight: dict[str, Any] = {"kv_cache_memory": pages, "max_model_len": 448, "max_num_batched_tokens": 96}
    with running_engine(checkpoint, model=model, **tight) as engine:
        lengths = (60, 61, 62, 63, 180)
        answers = [ask(engine, prompt(n, n), max_tokens=100, prompt_logprobs=0) for n in lengths]
        for length, answer in zip(lengths, answers, strict=True):
            answer.tokens()
            (started,) = [event for event in answer.events if isinstance(event, Started)]
            assert started.prompt_logprobs is not None
            asked = prompt(length, length)
            scores = [score for score in started.prompt_logprobs[1:] if score is not None]
            check_scores(scores, logprobs_of(reference, asked)[:-1], asked[1:], 0)
        assert engine.stats().preemptions > 0


# Who goes first, and who is turned away


def test_priorities(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, max_num_seqs=1) as engine:
        answers = [ask(engine, prompt(10), max_tokens=2)]
        brake.wait()
        # Told apart in the records by what they ask for.
        for priority, max_tokens in ((5, 6), (0, 4), (-5, 3), (1, 5)):
            answers.append(ask(engine, prompt(10, 9), priority=priority, max_tokens=max_tokens))
        brake.release()
        assert all(answer.tokens() for answer in answers)
    assert [record.max_tokens for record in records_of(engine).ended] == [2, 3, 4, 5, 6]


def test_full_queues(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, max_num_seqs=1, max_queued_requests=3) as engine:
        running = ask(engine, prompt(10))
        brake.wait()
        waiting = [ask(engine, prompt(10), n=n) for n in (1, 2)]
        with pytest.raises(Overloaded, match="3 requests wait, at most 3 may") as refused:
            ask(engine, prompt(10))
        assert refused.value.reason == "max_num_queued_reqs" and refused.value.retry_after >= 1
        waiting[0].ticket.cancel()  # type: ignore[union-attr]
        brake.step()
        waiting.append(ask(engine, prompt(10)))
        with pytest.raises(Overloaded):
            ask(engine, prompt(10))
        brake.release()
        assert [len(answer.tokens()) for answer in (running, waiting[1], waiting[2])] == [16] * 3
        assert len(ask(engine, prompt(10), n=64, max_tokens=1).tokens(63)) == 1, "alone, any request fits the queue"


def test_full_queues_of_tokens(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, max_num_batched_tokens=64, max_queued_tokens=150) as engine:
        long = ask(engine, prompt(120))
        brake.wait()
        assert engine.stats().pending_prefill_tokens == 120
        with pytest.raises(Overloaded, match="120 prompt tokens wait, at most 150 may") as refused:
            ask(engine, prompt(31))
        assert refused.value.reason == "max_num_queued_tokens"
        short = ask(engine, prompt(30))
        brake.step(2)
        assert engine.stats().pending_prefill_tokens <= 30, "the long prompt is computed"
        more = ask(engine, prompt(120, 1))
        brake.release()
        assert [len(answer.tokens()) for answer in (long, short, more)] == [16] * 3
        assert len(ask(engine, prompt(900)).tokens()) == 16
    assert engine.stats().pending_prefill_tokens == 0


def test_what_can_never_be_served(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model, max_model_len=100) as engine:
        wrong: list[tuple[dict[str, Any], str, str]] = [
            ({"prompt": prompt(100), "max_tokens": 1}, "prompt", "holds 100 tokens, but this server takes at most 100"),
            ({"prompt": prompt(90), "max_tokens": 11}, "max_tokens", "ask for at most 10"),
            ({"prompt": [VOCAB]}, "prompt", "outside the vocabulary"),
            ({"prompt": [-1]}, "prompt", "outside the vocabulary"),
            ({"prompt": []}, "prompt", "at least one token"),
            ({"prompt": [5], "stop_token_ids": (VOCAB,)}, "stop_token_ids", f"names token {VOCAB}"),
            ({"prompt": [5], "logit_bias": ((-1, 1.0),)}, "logit_bias", "names token -1"),
            ({"prompt": [5], "point": "fast"}, "attention.policy", "choose one of: exact"),
        ]
        for fields, param, said in wrong:
            with pytest.raises(InvalidRequest, match=said) as refused:
                ask(engine, **fields)
            assert refused.value.param == param
        assert len(ask(engine, prompt(99), max_tokens=1).tokens()) == 1
        assert len(ask(engine, prompt(100), max_tokens=0).tokens()) == 0
        assert engine.stats().pending_prefill_tokens == 0


# Giving up


def gone(engine: Engine, brake: Brake, answer: Answer, *, others: int = 0) -> None:
    """Cancel, twice; one step later the pages are free, and nothing but what that step computed is published.

    `others`: pages of the requests that go on."""
    assert answer.ticket is not None
    answer.ticket.cancel()
    answer.ticket.cancel()
    ask(engine, prompt(3), max_tokens=4)  # something to compute in the next steps
    before = len(answer.events)
    brake.step()
    assert held(engine) == 1 + others
    engine.cache.audit()
    seen = len(answer.events)
    assert seen - before <= answer.n
    brake.step()
    assert len(answer.events) == seen and not answer.done.is_set()


def test_cancel_in_the_middle_of_a_prompt(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, max_num_batched_tokens=64) as engine:
        answer = ask(engine, prompt(400))
        brake.wait()
        brake.step(2)
        assert held(engine) == 3
        gone(engine, brake, answer)
        brake.release()


def test_cancel_while_generating(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model) as engine:
        answer = ask(engine, prompt(100), max_tokens=500)
        brake.wait()
        brake.step(5)
        assert len(answer.deltas()) == 5 and held(engine) == 2
        gone(engine, brake, answer)
        brake.release()
    assert records_of(engine).ended[0].finish_reason == "abort"


def test_cancel_while_waiting(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, max_num_seqs=1) as engine:
        running = ask(engine, prompt(10), max_tokens=8)
        brake.wait()
        waiting = ask(engine, prompt(300), n=3)
        brake.step()
        assert engine.stats().waiting == 3
        waiting.ticket.cancel()  # type: ignore[union-attr]
        brake.step()
        stats = engine.stats()
        assert (stats.waiting, stats.running, stats.pending_prefill_tokens, held(engine)) == (0, 1, 0, 1)
        brake.release()
        assert len(running.tokens()) == 8
    assert waiting.events == []


def test_cancel_several_choices(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first choice generating and the others just admitted, beside another request that goes on."""
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model) as engine:
        other = ask(engine, prompt(10), max_tokens=20)
        many = ask(engine, prompt(100, 1), n=4, max_tokens=100)
        brake.wait()
        brake.step(3)
        gone(engine, brake, many, others=1)
        brake.release()
        assert len(other.tokens()) == 20


def test_cancel_after_the_end_and_without_a_beginning(checkpoint: Path, model: Model) -> None:
    with running_engine(checkpoint, model=model) as engine:
        answer = ask(engine, prompt(10))
        tokens = answer.tokens()
        answer.ticket.cancel()  # type: ignore[union-attr]
        Ticket("no such request", engine._loop).cancel()
        assert ask(engine, prompt(10)).tokens() == tokens
    answer.ticket.cancel()  # type: ignore[union-attr]
    assert len(answer.deltas()) == 16


def test_cancel_before_the_engine_looks(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model) as engine:
        running = ask(engine, prompt(10), max_tokens=4)
        brake.wait()
        answer = ask(engine, prompt(10))
        answer.ticket.cancel()  # type: ignore[union-attr]
        brake.release()
        running.tokens()
    assert answer.events == [] and engine.stats().pending_prefill_tokens == 0


# The end


def test_draining(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running and waiting requests end as they would have; new ones are turned away."""
    brake = Brake(monkeypatch)
    engine, _ = make_engine(checkpoint, model=model, max_num_seqs=1)
    engine.start()
    assert engine.health().ready
    answers = [ask(engine, prompt(30), max_tokens=6) for _ in range(3)]
    brake.wait()
    engine._loop.inbox.put(Stop(time.monotonic() + 1000))
    brake.step()
    assert not engine.health().ready and engine.health().alive
    with pytest.raises(Unavailable):
        ask(engine, prompt(5))
    brake.release()
    engine.stop(1000)
    assert [(len(answer.tokens()), answer.finish().finish_reason) for answer in answers] == [(6, "length")] * 3
    assert held(engine) == 0


def test_stopping_at_once(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brake = Brake(monkeypatch)
    engine, _ = make_engine(checkpoint, model=model, max_num_seqs=2)
    engine.start()
    answers = [ask(engine, prompt(30), max_tokens=1000, n=n) for n in (1, 2, 1)]
    brake.wait()
    brake.step(3)
    engine._loop.inbox.put(Stop(0.0))
    late = ask(engine, prompt(5))  # the engine will read it, and end it, behind the Stop
    brake.release()
    engine.stop(0.0)
    for answer, n in zip((*answers, late), (1, 2, 1, 1), strict=True):
        for index in range(n):
            end = answer.finish(index)
            assert (end.finish_reason, end.message) == ("error", SHUT_DOWN)
    assert len(answers[0].tokens()) > 0 and late.tokens() == []
    assert held(engine) == 0 and engine.stats().pending_prefill_tokens == 0
    engine.cache.audit()
    health = engine.health()
    assert not health.alive and not health.ready
    with pytest.raises(Unavailable):
        ask(engine, prompt(5))
    engine.stop(0.0)


def test_not_started(checkpoint: Path, model: Model) -> None:
    engine, _ = make_engine(checkpoint, model=model)
    with pytest.raises(Unavailable):
        ask(engine, prompt(5))
    assert not engine.health().alive
    engine.stop(1.0)


def test_many_threads(checkpoint: Path, model: Model) -> None:
    """Submitting and cancelling from several threads: all that is not cancelled is answered, and right."""
    with running_engine(checkpoint, model=model, max_queued_requests=100) as engine:
        expected = {n: ask(engine, prompt(n, n), max_tokens=5).tokens() for n in range(20, 28)}
        kept: list[tuple[int, Answer]] = []

        def client(number: int) -> None:
            for n in expected:
                answer = ask(engine, prompt(n, n), max_tokens=5)
                if (n + number) % 3 == 0:
                    answer.ticket.cancel()  # type: ignore[union-attr]
                else:
                    kept.append((n, answer))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(kept) == 16
        assert all(answer.tokens() == expected[n] for n, answer in kept)
