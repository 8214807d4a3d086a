"""The micro-benchmark behind a device profile: what it times, not how long that takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling import device as device_module
from gossamer.attention.profiling.candidates import Candidate, ladder
from gossamer.attention.profiling.device import DeviceBench
from gossamer.attention.profiling.noise import BATCHES, _index, noise_layers
from gossamer.attention.profiling.reading import Shape

SHAPE = Shape(1, 4, 2, 32, torch.float32, torch.device("cpu"), (None,))
CANDIDATES: dict[Phase, tuple[Candidate, ...]] = {phase: ladder(phase, labels=None, gates=None) for phase in PHASES}
KINDS = {phase: {each.kind for each in own} - {"dense", "sink-recent"} for phase, own in CANDIDATES.items()}


def bench(record: Callable[..., Any] | None = None) -> DeviceBench:
    return DeviceBench(SHAPE, Artefacts(Path(), SHAPE.device), (512, 1024), 512, lambda _: None, record)


def test_every_kind_is_timed_and_generated_steps_as_they_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "ROUNDS", 1)
    recorded: list[int] = []
    replayed: list[int] = []

    def record(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        number = len(recorded)
        recorded.append(number)
        if number == 0:
            raise RuntimeError("decides on the host")

        def replay() -> None:
            replayed.append(number)
            call()

        return replay, None

    found = bench(record).measure(CANDIDATES)
    for phase in PHASES:
        times = found.times(phase)
        assert set(times.choose) == KINDS[phase]
        assert [size for size, _ in times.dense.each.points] == [8.0, 16.0]
        assert [size for size, _ in times.attend.each.points] == [2.0, 8.0]
        assert [count for count, _ in times.tokens.points] == [0.0, 64.0, 512.0, 960.0]
        assert all(seconds > 0 for _, seconds in times.dense.each.points)
    assert found.chunk == 512
    works = 2 * 2 * (len(KINDS["decode"]) + 1) + 2 * 2 + 4  # two lengths of few and many; two sizes; tokens
    assert len(recorded) == works
    assert set(replayed) == set(range(1, works))


def test_noise_is_a_chunk_or_the_newest_tokens() -> None:
    few, many = noise_layers(SHAPE, "prefill", 1024, 512, [])
    assert [(row.pos, row.count) for row in many.blocks.rows] == [(at, 64) for at in range(512, 1024, 64)]
    assert [row.pos for row in few.blocks.rows] == [896, 960]
    assert (few.shares, many.shares) == (4, 16)
    short = noise_layers(SHAPE, "prefill", 256, 512, [])
    assert [len(layer.blocks) for layer in short] == [1, 4]
    one, four = noise_layers(SHAPE, "decode", 1024, 512, [])
    assert [(row.seq, row.pos, row.count) for row in four.blocks.rows] == [(n, 1023, 1) for n in range(BATCHES[1])]
    assert (one.shares, four.shares) == (2, 8)
    assert torch.equal(one.kv.k, four.kv.k)


def test_what_is_read_is_as_much_as_was_asked_for() -> None:
    for phase, own in (("prefill", [9, 10, 11, 12, 13, 14, 15, 16]), ("decode", [16] * 4)):
        layer = noise_layers(SHAPE, "prefill" if phase == "prefill" else "decode", 1024, 512, [])[1]
        assert _index(layer, 3, 0).count.tolist() == [[3] * len(own)] * 2
        assert _index(layer, 16, 0).count.tolist() == [own] * 2
        index = _index(layer, 1, 100)
        assert index.token_count is not None and index.tokens is not None
        assert index.token_count.unique().tolist() == [100]
        assert int(index.tokens.max()) < layer.blocks.rows[0].pos // 64 * 64
        last = index.pages[index.start.long()]
        assert last.tolist() == [[row.pos // 64 for row in layer.blocks.rows]] * 2
