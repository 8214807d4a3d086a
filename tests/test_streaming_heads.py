"""Streaming heads: they give their memory back, and answers are those of a model that masks exactly these heads."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Brake, ask, load_tiny, make_engine, running_engine
from tiny_models import VOCAB, save_tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import Dense, SinkRecent
from gossamer.kvcache.retention import KeepSinkRecent
from gossamer.server.config import ServerConfig
from gossamer.server.engine.families import StartupError
from gossamer.server.engine.model import Model

SINK, RECENT, NEW = 10, 70, 10
STREAMING = HeadPolicy(Dense(), Dense(), KeepSinkRecent(SINK, RECENT))
HEADS = ((DENSE, STREAMING), (STREAMING, DENSE), (DENSE, STREAMING))  # half of them, not the same ones in every layer
POLICY = AttentionPolicy("half", (OperatingPoint("exact", ((DENSE,) * 2,) * 3), OperatingPoint("fast", HEADS)))
LENGTHS = (40, 75, 130, 200, 333)


def masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, *, heads: Any, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """Plain attention in which each KV head sees what its retention rule keeps, written down from the definition."""
    at = torch.arange(query.shape[2])
    seen = []
    for policy in heads[module.layer_idx]:
        sink, window = policy.keep.sink, policy.keep.window
        seen.append((at <= at[:, None]) & ((at > at[:, None] - window) | (at < sink)))
    ratio = query.shape[1] // key.shape[1]
    mask = torch.stack(seen).repeat_interleave(ratio, 0)
    scores = query @ key.repeat_interleave(ratio, 1).transpose(2, 3) * scaling
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(ratio, 1)).transpose(1, 2), None


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def right(checkpoint: Path) -> dict[str, list[list[int]]]:
    """The greedy answers at each operating point, in float64 and without any cache."""
    AttentionInterface.register("masked", masked_attention)
    reference: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="masked")
    answers: dict[str, list[list[int]]] = {}
    for point in POLICY.points:
        answers[point.name] = []
        for asked in prompts():
            tokens = list(asked)
            for _ in range(NEW):
                with torch.inference_mode():
                    logits = reference(torch.tensor([tokens]), use_cache=False, heads=point.heads).logits
                tokens.append(int(logits[0, -1].argmax()))
            answers[point.name].append(tokens[len(asked) :])
    return answers


def test_the_reference_tells_the_points_apart(right: dict[str, list[list[int]]]) -> None:
    """Prompts inside the window have the same answer; longer ones have another, or these tests would show nothing."""
    same = [a == b for a, b in zip(right["exact"], right["fast"], strict=True)]
    assert same[0] and not any(same[2:])


@pytest.mark.parametrize("chunk", [24, 100, 512])
def test_equals_a_model_that_masks_these_heads(
    checkpoint: Path, model: Model, right: dict[str, list[list[int]]], chunk: int
) -> None:
    """Alone, after prefix hits, and both operating points in one batch."""
    with running_engine(checkpoint, model=model, policy=POLICY, max_num_batched_tokens=chunk) as engine:
        alone = [ask(engine, asked, point="fast", max_tokens=NEW) for asked in prompts()]
        assert [answer.tokens() for answer in alone] == right["fast"]
        assert [answer.cached for answer in alone] == [0] * len(LENGTHS)
        mixed = [
            (point, ask(engine, asked, point=point, max_tokens=NEW)) for asked in prompts() for point in POLICY.names
        ]
        for point in POLICY.names:
            assert [answer.tokens() for name, answer in mixed if name == point] == right[point]
        hits = [answer.cached for name, answer in mixed if name == "fast"]
        assert hits == [(n - 1) // 64 * 64 for n in LENGTHS]


def test_prefix_hits_need_the_window_only(
    checkpoint: Path, model: Model, right: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hit on a streaming head takes its sink and its last window, and leaves the pages between alone."""
    brake = Brake(monkeypatch)
    with running_engine(checkpoint, model=model, policy=POLICY) as engine:
        longest = prompts()[-1]
        first = ask(engine, longest, point="fast", max_tokens=NEW)
        brake.wait()
        brake.step(3)
        again = ask(engine, longest, point="fast", max_tokens=NEW)
        brake.step(2)
        (one,) = (s for s in engine._loop.scheduler.running if s.cached)
        held = {rule.rule: pages for rule, pages in zip(engine.stats().rules, one.table.held, strict=True)}
        assert held == {"all": 6, "all/sink10+recent70": 3}
        brake.release()
        assert first.tokens() == again.tokens() == right["fast"][-1]
        assert again.cached == 320


def test_equals_after_preemptions(checkpoint: Path, model: Model, right: dict[str, list[list[int]]]) -> None:
    """In the least memory in which the longest fits; whoever is recomputed comes out the same."""
    options: dict[str, Any] = {"max_model_len": 344, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    options |= {"max_queued_tokens": 10**6, "max_queued_requests": 1000}
    for memory in range(300_000, 3_000_000, 50_000):
        with suppress(StartupError):
            make_engine(checkpoint, model=model, policy=POLICY, kv_cache_memory=memory, **options)
            break
    growing = prompts()[3][:120]  # outgrows its last page while it is answered, so that the pages do not suffice
    with running_engine(checkpoint, model=model, policy=POLICY) as engine:
        grown = ask(engine, growing, point="fast", max_tokens=30).tokens()
    with running_engine(checkpoint, model=model, policy=POLICY, kv_cache_memory=memory, **options) as engine:
        asked = [(point, i) for i in (4, 2, 1, 4, 3, 0, 2) for point in ("fast", "exact")]
        answers = [ask(engine, prompts()[i], point=point, max_tokens=NEW) for point, i in asked]
        edge = [ask(engine, growing, point="fast", max_tokens=30) for _ in range(6)]
        assert [answer.tokens() for answer in answers] == [right[point][i] for point, i in asked]
        assert [answer.tokens() for answer in edge] == [grown] * 6
        assert engine.stats().preemptions > 0


def held_while_generating(
    path: Path, model: Model, policy: AttentionPolicy, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Bytes of keys and values that one sequence of 32K tokens owns before each of some generated tokens."""
    asked = [4 + i % 300 for i in range(32_768 - 70)]
    options = {"kv_cache_memory": 80 * 2**20, "max_num_batched_tokens": 2048, "max_num_seqs": 1}
    with monkeypatch.context() as patch, running_engine(path, model=model, policy=policy, **options) as engine:
        brake = Brake(patch)
        answer = ask(engine, asked, max_tokens=70)
        brake.wait()
        while not answer.started.is_set():
            brake.step()
        owned = []
        for _ in range(66):
            owned.append(sum(rule.bytes_owned for rule in engine.stats().rules))
            brake.step()
        brake.release()
        assert len(answer.tokens()) == 70
    return owned


def test_half_the_heads_streaming_halves_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32K tokens, half of the KV heads at sink 64 + recent 256: at most 52 % of the bytes of the dense policy.

    What is kept does not depend on what is read, so all heads read little here and the test is over soon.
    """
    path = save_tiny_model(tmp_path, num_hidden_layers=2, max_position_embeddings=2**15)
    model = load_tiny(ServerConfig(model=str(path), dtype="float32"))
    reads = SinkRecent(64, 256)
    keeping, streaming = HeadPolicy(reads, reads, DENSE.keep), HeadPolicy(reads, reads, KeepSinkRecent(64, 256))
    dense, half = (
        held_while_generating(path, model, AttentionPolicy("x", (OperatingPoint("p", (heads,) * 2),)), monkeypatch)
        for heads in ((keeping, keeping), (keeping, streaming))
    )
    page = 2 * 64 * 32 * 4 * 2  # one head's K and V in both layers
    assert dense[0] == 511 * 2 * page and dense[-1] == 512 * 2 * page
    assert all(streamed <= 0.52 * whole for streamed, whole in zip(half, dense, strict=True))
    assert half[-1] <= (512 + 1 + 6) * page
