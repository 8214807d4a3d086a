"""Recorded decode steps, with the Triton kernels under their interpreter: what is decided at recording is never decided
again, as in a CUDA graph. test_graphs.py runs this file in a process of its own."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Answer, ask, make_engine
from selector_cases import gate, labels
from tiny_models import VOCAB

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import BlockSparse, Budget, DoubleSparsity, SinkRecent
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.graphs import DecodeGraphs, Tensors, Token
from gossamer.server.engine.model import Model

assert os.environ.get("TRITON_INTERPRET") == "1", "test_graphs.py runs this file"

RATIO, DIM = 2, 32
FEW = Budget("tokens", 192)
MEAN = HeadPolicy(DENSE.prefill, BlockSparse(FEW, corrects=True), KeepAll())
BOUNDS = HeadPolicy(DENSE.prefill, BlockSparse(Budget("mass", 0.6), "bounds", above=255), KeepAll())
TOKENS = HeadPolicy(DENSE.prefill, DoubleSparsity(labels(2, DIM), 40), KeepAll())
GATED = HeadPolicy(DENSE.prefill, gate("decode", 2, RATIO, DIM, FEW), KeepAll())
STREAMING = HeadPolicy(DENSE.prefill, SinkRecent(64, 64), KeepSinkRecent(64, 64))
POLICY = AttentionPolicy(
    "mixed",
    (
        OperatingPoint("exact", ((DENSE,) * 2,) * 3),
        OperatingPoint("sparse", ((MEAN, TOKENS), (GATED, GATED), (STREAMING, BOUNDS))),
    ),
)
LENGTHS = (70, 253, 317)  # the last two fill a page on their way; the second comes to where BOUNDS begins to select
ASKED = 7


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Every tensor says that it lies on a GPU, so that the Triton kernels are taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        yield


@dataclass
class FakeRecorder:
    """A replay runs the function again, and lets its results appear where they were at recording."""

    recorded: int = 0
    replayed: int = 0

    def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        self.recorded += 1
        with as_on_a_gpu():
            out = tuple(each.clone() for each in run())

        def replay() -> None:
            self.replayed += 1
            with as_on_a_gpu():
                found = run()
            for mine, new in zip(out, found, strict=True):
                mine.copy_(new)

        return replay, out


def engine_of(checkpoint: Path, model: Model, record: FakeRecorder | None, **options: Any) -> Engine:
    engine, _ = make_engine(checkpoint, model=model, policy=POLICY, max_num_batched_tokens=1024, **options)
    if record is not None:
        executor = engine._loop.executor
        executor.graphs = DecodeGraphs(model, executor.cache, 6, 16, POLICY.points, record)
    return engine


def answers(engine: Engine, points: tuple[str, ...]) -> list[Answer]:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    engine.start()
    try:
        asked = [ask(engine, p, point=point, max_tokens=ASKED) for p, point in zip(prompts, points, strict=True)]
        for answer in asked:
            answer.tokens()
    finally:
        engine.stop(0.0)
        engine.cache.audit()
    return asked


@pytest.mark.parametrize(
    ("points", "ahead"),
    [(("sparse",) * 3, False), (("sparse", "exact", "sparse"), True)],
    ids=["one point", "two points, launched ahead"],
)
def test_recorded_steps_answer_as_others_do(
    checkpoint: Path, model: Model, points: tuple[str, ...], ahead: bool
) -> None:
    record = FakeRecorder()
    plain = answers(engine_of(checkpoint, model, None), points)
    recorded = answers(engine_of(checkpoint, model, record, ahead=ahead), points)
    assert record.replayed >= ASKED - 1  # more where a sequence began alone
    for mine, theirs in zip(recorded, plain, strict=True):
        assert mine.tokens() == theirs.tokens()
        assert mine.finish().attention == theirs.finish().attention


def test_recorded_steps_of_an_fp8_cache(checkpoint: Path, model: Model) -> None:
    """The scales are where the recording reads them."""
    record, points = FakeRecorder(), ("sparse", "exact", "sparse")
    plain = answers(engine_of(checkpoint, model, None, kv_cache_dtype="fp8"), points)
    recorded = answers(engine_of(checkpoint, model, record, kv_cache_dtype="fp8"), points)
    assert record.replayed >= ASKED - 1
    for mine, theirs in zip(recorded, plain, strict=True):
        assert mine.tokens() == theirs.tokens()


def test_sizes_are_recorded_ahead(checkpoint: Path, model: Model) -> None:
    record, said = FakeRecorder(), list[str]()
    engine = engine_of(checkpoint, model, record)
    graphs = engine._loop.executor.graphs
    assert graphs is not None
    graphs.most_rows, graphs.most_pages = 3, 70
    graphs.record_ahead(said.append)
    # 1, 2 and 3 sequences; 64 and 70 pages; either point, and both; each with one for summaries
    assert record.recorded == 36 and record.replayed == 0
    assert said == ["Recorded decode steps of up to 3 sequences and 70 pages as 18 graphs"]
    table = engine.cache.table([KeepAll()] * 2, b"")
    engine.cache.grow(table, 1)
    assert graphs.run([Token(0, 0, POLICY.points[0], table)]) is not None
    engine.cache.drop(table)
    assert record.recorded == 36 and record.replayed == 1


def test_sizes_without_memory_are_served_without(checkpoint: Path, model: Model) -> None:
    record, said = FakeRecorder(), list[str]()

    def two(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        if record.recorded == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(run)

    engine = engine_of(checkpoint, model, None)
    graphs = DecodeGraphs(model, engine.cache, 3, 70, POLICY.points[:1], two)
    engine._loop.executor.graphs = graphs
    graphs.record_ahead(said.append)
    assert said == [
        "Recorded decode steps of up to 3 sequences and 70 pages as 2 graphs; for 4 sizes there was not enough memory"
    ]
    assert (
        not graphs.broken
        and graphs.run([Token(0, 0, POLICY.points[0], engine.cache.table([KeepAll()] * 2, b""))]) is None
    )
    plain = answers(engine_of(checkpoint, model, None), ("exact",) * 3)
    for mine, theirs in zip(answers(engine, ("exact",) * 3), plain, strict=True):
        assert mine.tokens() == theirs.tokens()


def test_a_model_that_cannot_be_recorded_is_served_without(checkpoint: Path, model: Model) -> None:
    def refuse(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = engine_of(checkpoint, model, None)
    engine._loop.executor.graphs = DecodeGraphs(model, engine.cache, 6, 16, POLICY.points, refuse)
    plain = answers(engine_of(checkpoint, model, None), ("sparse",) * 3)
    for mine, theirs in zip(answers(engine, ("sparse",) * 3), plain, strict=True):
        assert mine.tokens() == theirs.tokens()
