"""How much of the GPU a layer asks for with each generated token, however it selects: seen on tensors without data.

Every operation of the device takes some microseconds of a recorded step, whatever its size. Dense attention needs five
of them; at 32K tokens on a large GPU, attention to few pages takes no longer than ten.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import test_no_waiting
import torch
from selector_cases import gate, labels
from test_no_waiting import DIM, GPU, RATIO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.attention.attend import attend
from gossamer.attention.policy import AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import BlockSparse, Budget, Dense, DoubleSparsity, Selector, SinkRecent
from gossamer.attention.step import Step
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll
from gossamer.server.engine.graphs import DecodeGraphs, Tensors

gpu = test_no_waiting.gpu
HEADS = 4
FEW = Budget("tokens", 2048, recent=128)
MEAN, BOUNDS = BlockSparse(FEW), BlockSparse(Budget("mass", 0.9, least=256, recent=128), "bounds")


CASES: dict[str, tuple[int, Callable[[], list[Selector]]]] = {
    "dense": (5, lambda: [Dense()] * HEADS),
    "sink-recent": (5, lambda: [SinkRecent(64, 1984)] * HEADS),
    "mean keys": (11, lambda: [MEAN] * HEADS),
    "bounds": (11, lambda: [BOUNDS] * HEADS),
    "gate": (13, lambda: [gate("decode", HEADS, RATIO, DIM, FEW, device="meta")] * HEADS),
    "labels": (15, lambda: [DoubleSparsity(labels(HEADS, DIM, "meta"), 2048, mass=0.9)] * HEADS),
    "mean keys corrected": (14, lambda: [replace(MEAN, corrects=True)] * HEADS),
    "mean keys above a length": (14, lambda: [replace(MEAN, above=16384)] * HEADS),
    "mixed": (20, lambda: [replace(MEAN, above=16384), replace(BOUNDS, above=8192), Dense(), Dense()]),
}


class Operations(TorchDispatchMode):
    """Takes down what torch has the device do: neither views nor room for results."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not view and not func._schema.name.startswith("aten::empty"):
            self.seen.append(func._schema.name)
        return found


class SecondLayer:
    """In place of a model: attends twice, and takes down the second time, when all that layers share is there."""

    device = GPU
    shape = SimpleNamespace(ratio=RATIO, kv_heads=HEADS, head_dim=DIM, layers=1, vocabulary=8)

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def forward(self, tokens: Tensor, positions: Tensor, step: Step, last: Tensor) -> Tensor:
        module = nn.Module()
        module.layer_idx = 0  # type: ignore[assignment]
        q, k = (torch.empty(1, heads, len(tokens), DIM, device=GPU) for heads in (HEADS * RATIO, HEADS))
        for _ in range(2):
            self.seen.clear()
            attend(module, q, k, k, None, step=step, scaling=0.1)
        self.seen.append("the end")
        return torch.empty(len(tokens), 8, device=GPU)


@pytest.mark.parametrize("name", CASES)
def test_operations_of_a_layer(gpu: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    most, heads = CASES[name]
    seen: list[str] = []
    run = "triton.runtime.jit.JITFunction.run"
    monkeypatch.setattr(run, lambda kernel, *args, **options: seen.append(kernel.__name__))
    point = OperatingPoint("only", (tuple(HeadPolicy(each, each, KeepAll()) for each in heads()),))
    policy = AttentionPolicy("all", (point,))
    groups = group_heads(policy.rules())
    sizes = {"ratio": RATIO, "head_dim": DIM, "dtype": torch.float32, "device": GPU}
    cache = KVCache(groups, [64] * len(groups), **sizes, summaries=policy.summaries())

    def record(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        with Operations(seen):
            return (lambda: None), run()

    graphs = DecodeGraphs(SecondLayer(seen), cache, 4, 16, (point,), record)  # type: ignore[arg-type]
    graphs._make(4, 16, (point,) * 4)
    own = seen[: seen.index("the end")]
    assert own[0] == "_store" and "_join_pieces" in own
    assert len(own) == most, own
