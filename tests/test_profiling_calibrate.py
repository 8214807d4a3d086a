"""What calibration says of candidates, against attention computed slowly in float64."""

import itertools
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy import AttentionPolicy, HeadPolicy, OperatingPoint, dense_policy
from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.calibrate import Calibration, Tables
from gossamer.attention.profiling.candidates import Candidate, ladder
from gossamer.attention.profiling.capture import Captured, capture
from gossamer.attention.profiling.fidelity import Fidelity, losses
from gossamer.attention.profiling.findings import add_up, flatten, unflatten
from gossamer.attention.profiling.projection import gram_of_heads, output_weight, squared_errors
from gossamer.attention.profiling.prompts import Document, Exchange
from gossamer.attention.profiling.reading import Reader, shape_of
from gossamer.attention.profiling.state import State
from gossamer.attention.profiling.statistics import Statistics
from gossamer.attention.profiling.stopwatch import Stopwatch
from gossamer.attention.selectors import Dense, Selector, SinkRecent
from gossamer.kvcache.retention import KeepAll

LENGTH, PROMPT, QUESTION = 500, 490, 460
TOKENS = torch.randint(4, 300, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
EXCHANGE = Exchange(tuple(TOKENS), QUESTION, PROMPT, ((492, 495),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "llama")
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():  # so that heads look at something
        for layer in module.model.layers:
            layer.self_attn.q_proj.weight *= 12
    return module


@pytest.fixture(scope="module")
def ladders() -> dict[Phase, tuple[Candidate, ...]]:
    return {phase: ladder(phase, labels=None, gates=None) for phase in PHASES}


@pytest.fixture(scope="module")
def tables(model: Any, ladders: dict[Phase, tuple[Candidate, ...]]) -> dict[Phase, Tables]:
    shape = shape_of(model)
    calibration = Calibration(ladders, shape, Artefacts(Path()), 0)
    dense = dense_policy(shape.layers, shape.kv_heads)
    reader = Reader(model, dense, room=640, summaries=calibration.summaries, watcher=calibration, shape=shape)
    calibration.begin(EXCHANGE, 2048)
    reader.read(TOKENS, prompt=PROMPT, rows=())
    return calibration.tables


def test_dense_is_without_error_and_the_ladder_is_in_order(
    tables: dict[Phase, Tables], ladders: dict[Phase, tuple[Candidate, ...]]
) -> None:
    for phase, own in tables.items():
        assert ladders[phase][0].backend.backend == "dense"
        assert float(own.error[0].abs().max()) == 0.0
        torch.testing.assert_close(own.recall[0], own.queries.expand_as(own.recall[0]))
        torch.testing.assert_close(own.read[0], own.possible)
        assert (own.read <= own.possible + 1e-6).all()
        shares = [n for n, each in enumerate(ladders[phase]) if each.kind == "block-sparse mean by share"]
        for wide, narrow in pairwise(shares):
            assert (own.read[wide] >= own.read[narrow]).all()


def test_generated_tokens_are_all_tried_and_the_question_too(tables: dict[Phase, Tables]) -> None:
    assert int(tables["decode"].queries[0]) >= LENGTH - PROMPT
    assert int(tables["prefill"].queries[0]) == PROMPT - QUESTION


def attended(layer: Captured, kept: Tensor) -> tuple[Tensor, Tensor]:
    """kept [T, T] bool -> out [T, H, D] and the share of dense mass that is kept [T, H], in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (layer.q, layer.k, layer.v))
    k, v = (x.repeat_interleave(layer.ratio, 0) for x in (k, v))
    place = torch.arange(q.shape[1])
    causal = place <= place[:, None]
    logits = (q @ k.transpose(1, 2) * layer.scale).masked_fill(~causal, -torch.inf)
    weight = logits.softmax(-1)
    mass = (weight * kept).sum(-1)
    out = (weight * kept / mass[..., None]) @ v
    return out.transpose(0, 1), mass.T


def test_a_streaming_candidate_has_the_error_and_recall_of_its_formula(
    model: Any, tables: dict[Phase, Tables], ladders: dict[Phase, tuple[Candidate, ...]]
) -> None:
    shape, phase = shape_of(model), "decode"
    number = next(n for n, each in enumerate(ladders["decode"]) if each.window == (64, 128))
    layers = capture(model, torch.tensor(TOKENS), dense_policy(shape.layers, shape.kv_heads))
    place = torch.arange(LENGTH)
    kept = (place <= place[:, None]) & ((place > place[:, None] - 128) | (place < 64))
    asked = range(PROMPT, LENGTH)
    for n, layer in enumerate(layers):
        dense, _ = attended(layer, place <= place[:, None])
        out, mass = attended(layer, kept)
        weight = model.model.layers[n].self_attn.o_proj.weight.double()
        norm = (dense[asked].flatten(1) @ weight.T).square().sum()
        # other single queries of the question's region may have been tried too: compare the mean of those generated
        count = tables[phase].queries[0]
        assert int(count) == len(asked)
        torch.testing.assert_close(tables[phase].norm[n, 0], norm.detach(), rtol=1e-3, atol=0.0)
        for g in range(shape.kv_heads):
            own = slice(g * layer.ratio, (g + 1) * layer.ratio)
            wrong = torch.zeros_like(dense)
            wrong[:, own] = (out - dense)[:, own]
            expected = (wrong[asked].flatten(1) @ weight.T).square().sum().detach()
            torch.testing.assert_close(tables[phase].error[number, n, g, 0], expected, rtol=1e-3, atol=1e-9)
            kept_mass = mass[asked, own].mean(1).sum()
            torch.testing.assert_close(tables[phase].recall[number, n, g, 0], kept_mass, rtol=1e-3, atol=1e-6)


def test_errors_of_a_head_are_measured_behind_the_projection(model: Any) -> None:
    shape = shape_of(model)
    attention = model.model.layers[1].self_attn
    weight = output_weight(attention, shape)
    error = torch.randn(7, shape.query_heads, shape.head_dim, generator=torch.Generator().manual_seed(1))
    found = squared_errors(error, gram_of_heads(weight, shape))
    for g in range(shape.kv_heads):
        own = torch.zeros_like(error)
        own[:, g * shape.ratio : (g + 1) * shape.ratio] = error[:, g * shape.ratio : (g + 1) * shape.ratio]
        with torch.no_grad():
            expected = (attention.o_proj(own.flatten(1)) - attention.o_proj(torch.zeros(1, own[0].numel()))).square()
        torch.testing.assert_close(found[:, g], expected.sum(1), rtol=1e-4, atol=1e-5)


def test_documents_add_up_to_relative_errors(tables: dict[Phase, Tables]) -> None:
    one = unflatten(flatten(tables))["prefill"]
    louder = Tables(one.error * 100, one.norm * 100, *(getattr(one, f) for f in ("recall", "queries", "read")),
                    one.possible, one.singles)  # fmt: skip
    both, alone = add_up([one, louder]), add_up([one])
    torch.testing.assert_close(both.error, alone.error)
    torch.testing.assert_close(both.density, alone.density)
    assert float(both.spread.abs().max()) < 1e-9
    assert both.error.shape == both.recall.shape == both.density.shape
    assert float(alone.recall.max()) <= 1.0 + 1e-6


def test_where_heads_look_is_what_the_softmax_says(model: Any) -> None:
    shape = shape_of(model)
    statistics = Statistics(shape, LENGTH, 3)
    reader = Reader(model, dense_policy(shape.layers, shape.kv_heads), room=640, watcher=statistics, shape=shape)
    reader.read(TOKENS, prompt=LENGTH - 1, rows=())
    layers = capture(model, torch.tensor(TOKENS), dense_policy(shape.layers, shape.kv_heads))
    looks = statistics.looks
    assert 2 <= int(looks.queries) <= 6  # the generated one, and some of the prompt
    torch.testing.assert_close(looks.distance.sum(-1), looks.queries.expand(shape.layers, shape.kv_heads))
    single = Statistics(shape, LENGTH, 3)
    chosen: list[int] = []
    single._add = lambda call, kv, at, position: chosen.append(position) if call.layer == 0 else None  # type: ignore[method-assign]
    Reader(model, dense_policy(shape.layers, shape.kv_heads), room=640, watcher=single, shape=shape).read(
        TOKENS, prompt=LENGTH - 1, rows=()
    )
    for n, layer in enumerate(layers):
        place = torch.arange(LENGTH)
        _, sink = attended(layer, place.expand(LENGTH, -1) < 64)
        expected = sink[chosen].unflatten(1, (shape.kv_heads, -1)).mean(2).sum(0)
        torch.testing.assert_close(looks.sink[n], expected, rtol=1e-4, atol=1e-6)


def test_trials_compare_with_dense(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of(model)
    documents = [Document("some", LENGTH, 0, "train", (EXCHANGE,))]
    fidelity = Fidelity(model, shape, dense_policy(shape.layers, shape.kv_heads), 2048)
    readers: list[Reader] = []
    monkeypatch.setattr(
        "gossamer.attention.profiling.fidelity.Reader",
        lambda *args, **named: readers.append(Reader(*args, **named)) or readers[-1],
    )
    ticks: Iterator[int] = iter(range(10))
    head = HeadPolicy(SinkRecent(64, LENGTH), SinkRecent(64, LENGTH), KeepAll())
    everything = AttentionPolicy("all", (OperatingPoint("all", ((head,) * shape.kv_heads,) * shape.layers),))
    again = fidelity.try_point(everything, documents, lambda: next(ticks) and None)
    assert 0.0 <= again.divergence() < 1e-6
    assert next(ticks) == 1
    same = fidelity.try_point(dense_policy(shape.layers, shape.kv_heads), documents, lambda: None)
    assert same.divergence() == 0.0 and same.reads == again.reads
    assert len(readers) == 2  # dense attention has read it once
    cell = same.cells()["some", LENGTH]
    with torch.no_grad():
        said = model(torch.tensor([TOKENS])).logits[0].argmax(-1)
    right = all(int(said[at - 1]) == TOKENS[at] for at in range(492, 495))
    assert cell.accuracy == float(right)
    assert losses(same, same) == {("some", LENGTH): 0.0}


def test_what_was_found_is_found_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def make(what: str) -> dict[str, Tensor]:
        calls.append(what)
        return {"a": torch.ones(2)}

    state = State(tmp_path / "state", "one")
    assert not state.resumed
    state.tensors("t", lambda: make("first"))
    assert state.value("v", list[int], lambda: [1, 2]) == [1, 2]
    again = State(tmp_path / "state", "one")
    assert again.resumed
    assert torch.equal(again.tensors("t", lambda: make("second"))["a"], torch.ones(2))
    assert again.value("v", list[int], lambda: [3]) == [1, 2]
    (tmp_path / "state" / "v.json").write_text("[1, 2", "utf-8")  # cut off
    assert again.value("v", list[int], lambda: [3]) == [3]
    (tmp_path / "state" / "t.safetensors").write_bytes(b"\0\0")
    again.tensors("t", lambda: make("third"))
    other = State(tmp_path / "state", "another")
    assert not other.resumed
    other.tensors("t", lambda: make("fourth"))
    assert calls == ["first", "third", "fourth"]


def test_time_of_a_run_that_was_interrupted_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 3.0)
    monkeypatch.setattr("gossamer.attention.profiling.stopwatch.time", SimpleNamespace(monotonic=lambda: next(now)))
    first = Stopwatch(State(tmp_path / "state", "one"))
    with first.stage("search"):
        pass
    with pytest.raises(KeyboardInterrupt), first.stage("verification"):
        raise KeyboardInterrupt
    second = Stopwatch(State(tmp_path / "state", "one"))
    with second.stage("verification"):
        pass
    assert [(each.stage, each.seconds) for each in second.spent] == [("search", 3.0), ("verification", 6.0)]
    assert all(each.memory > 0 for each in second.spent)
    assert Stopwatch(State(tmp_path / "state", "another")).spent == ()


@pytest.mark.parametrize("prompts", [Dense(), SinkRecent(64, 128)])
def test_decoding_is_tried_on_prompts_that_were_read_once(model: Any, prompts: Selector) -> None:
    shape = shape_of(model)
    dense = dense_policy(shape.layers, shape.kv_heads)
    heads = [HeadPolicy(prompts, SinkRecent(64, recent), KeepAll()) for recent in (64, 256)]
    points = [OperatingPoint("tried", ((head,) * shape.kv_heads,) * shape.layers) for head in heads]
    policies = [AttentionPolicy("tried", (point,)) for point in points]
    documents = [Document("some", LENGTH, 0, "train", (EXCHANGE, EXCHANGE))]
    fidelity = Fidelity(model, shape, dense, 2048)
    quick = fidelity.try_decodes(policies, documents, lambda: None)
    slow = [fidelity.try_point(policy, documents, lambda: None) for policy in policies]
    for one, other in zip(quick, slow, strict=True):
        assert one.divergence() == pytest.approx(other.divergence(), rel=1e-3)
    assert quick[0].divergence() != quick[1].divergence() and min(each.divergence() for each in quick) > 1e-6
