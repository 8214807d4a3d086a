"""Sparse requests in the real engine: neighbours, prefix hits, chunks and preemption do not change their answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import ask, make_engine, running_engine
from selector_cases import gate, labels
from tiny_models import VOCAB

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import BlockSparse, Budget, DoubleSparsity, SinkRecent
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent
from gossamer.server.engine.model import Model
from gossamer.server.engine.scheduler import Part

RATIO, DIM = 2, 32
FEW, MOST = Budget("tokens", 192), Budget("mass", 0.7, least=128)
PAGES = HeadPolicy(BlockSparse(FEW, corrects=True), BlockSparse(FEW, "bounds"), KeepAll())
TOKENS = HeadPolicy(BlockSparse(MOST, "antidiagonal", 8), DoubleSparsity(labels(2, DIM), 40), KeepAll())
GATED = HeadPolicy(gate("prefill", 2, RATIO, DIM, FEW), gate("decode", 2, RATIO, DIM, FEW), KeepAll())
STREAMING = HeadPolicy(SinkRecent(64, 128), SinkRecent(64, 128), KeepSinkRecent(64, 128))
POLICY = AttentionPolicy(
    "mixed",
    (
        OperatingPoint("exact", ((DENSE,) * 2,) * 3),
        OperatingPoint("sparse", ((PAGES, TOKENS), (GATED, GATED), (STREAMING, PAGES))),
    ),
)
LENGTHS = (70, 400, 515, 640)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(checkpoint: Path, model: Model) -> dict[str, list[list[int]]]:
    """Each request by itself, nothing cached."""
    answers: dict[str, list[list[int]]] = {}
    with running_engine(checkpoint, model=model, policy=POLICY, enable_prefix_caching=False) as engine:
        for point in POLICY.names:
            answers[point] = [ask(engine, prompt, point=point).tokens() for prompt in prompts()]
    return answers


def test_sparse_answers_are_others_than_dense_ones(alone: dict[str, list[list[int]]]) -> None:
    """Or nothing here would show anything."""
    assert alone["sparse"][0] == alone["exact"][0]  # two pages: both are always read
    assert all(a != b for a, b in zip(alone["sparse"][1:], alone["exact"][1:], strict=True))


@pytest.mark.parametrize("chunk", [200, 1000])
def test_in_one_batch_and_after_prefix_hits(
    checkpoint: Path, model: Model, alone: dict[str, list[list[int]]], chunk: int
) -> None:
    with running_engine(checkpoint, model=model, policy=POLICY, max_num_batched_tokens=chunk) as engine:
        for _ in range(2):
            asked = [(point, n, ask(engine, p, point=point)) for point in POLICY.names for n, p in enumerate(prompts())]
            for point, n, answer in asked:
                assert answer.tokens() == alone[point][n]
        assert [answer.cached for point, _, answer in asked if point == "sparse"] == [
            (n - 1) // 64 * 64 for n in LENGTHS
        ]


def test_preempted(checkpoint: Path, model: Model, alone: dict[str, list[list[int]]]) -> None:
    """Three prompts of seven pages fit into 22; when they need an eighth, one has to go, and is computed again."""
    options = {"model": model, "policy": POLICY, "max_model_len": 704, "enable_prefix_caching": False}
    memory = 3 * 2**19
    while make_engine(checkpoint, kv_cache_memory=memory, **options)[0]._loop.scheduler.cache.capacity[0] < 22:
        memory += 2**14
    with running_engine(checkpoint, kv_cache_memory=memory, **options) as engine:
        assert engine._loop.scheduler.cache.capacity[0] == 22
        asked = [ask(engine, prompts()[1], point="sparse", max_tokens=100) for _ in range(3)]
        for answer in asked:
            assert answer.tokens()[:16] == alone["sparse"][1]
        assert len({tuple(answer.tokens()) for answer in asked}) == 1
        assert engine.stats().preemptions > 0


def test_a_step_is_replayed_when_all_of_it_is_newest_tokens(checkpoint: Path, model: Model) -> None:
    """A preempted sequence may have one old token to compute, whose logits nobody wants."""
    engine, _ = make_engine(checkpoint, model=model)
    executor = engine._loop.executor
    seen: list[int] = []
    executor.graphs = SimpleNamespace(run=lambda tokens, unread: seen.append(len(tokens)))  # type: ignore[assignment]
    sequence: Any = SimpleNamespace(tokens=[1, 2, 3, 4, 5], prompt_length=3, point=None, table=None)
    newest, old, prompt = Part(sequence, 4, 1, True), Part(sequence, 3, 1, False), Part(sequence, 2, 1, False)
    for parts in ([newest, old], [prompt], [newest, Part(sequence, 3, 2, True)]):
        assert executor._replay(parts, None) is None and not seen
    executor._replay([newest], None)
    assert seen == [1]


def test_warming_up_leaves_nothing_behind(checkpoint: Path, model: Model, alone: dict[str, list[list[int]]]) -> None:
    engine, records = make_engine(checkpoint, model=model, policy=POLICY, attention_point="sparse")
    engine.warm_up(500)
    engine.cache.audit()
    assert all(pool.pages_owned == pool.pages_cached == 0 for pool in engine.cache.stats())
    engine.start()
    try:
        assert ask(engine, prompts()[1]).tokens() == alone["sparse"][1]
    finally:
        engine.stop(0.0)
    assert sum(step.prompt_tokens for step in records.steps) == LENGTHS[1]
