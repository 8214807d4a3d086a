"""The engine on a GPU: nothing that launches a step waits for the device, and steps that are recorded, or launched one
ahead, answer as others do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ask, load_tiny, running_engine
from selector_cases import gate, labels
from tiny_models import VOCAB, save_tiny_model

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import BlockSparse, Budget, DoubleSparsity, SinkRecent, VerticalSlash
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent
from gossamer.server.config import ServerConfig
from gossamer.server.engine.executor import Executor
from gossamer.server.engine.graphs import DecodeGraphs
from gossamer.server.engine.model import Model, load_model

pytestmark = pytest.mark.gpu

RATIO, DIM = 2, 32
FEW = Budget("tokens", 192)
LENGTHS = (70, 250, 400, 515)
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.0, "seed": 2, "top_k": 20, "presence_penalty": 1.0, "stop_token_ids": tuple(range(4, 12))},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "min_tokens": 5, "prompt_logprobs": 1},
)


def policy() -> AttentionPolicy:
    prefill, decode = (gate(phase, 2, RATIO, DIM, FEW, device="cuda") for phase in ("prefill", "decode"))
    gated = HeadPolicy(prefill, decode, KeepAll())
    pages = HeadPolicy(BlockSparse(FEW, corrects=True), BlockSparse(FEW, "bounds", above=300), KeepAll())
    tokens = HeadPolicy(VerticalSlash(60, 40), DoubleSparsity(labels(2, DIM, "cuda"), 40), KeepAll())
    streaming = HeadPolicy(SinkRecent(64, 128), SinkRecent(64, 128), KeepSinkRecent(64, 128))
    sparse = ((pages, tokens), (gated, gated), (streaming, pages))
    return AttentionPolicy("mixed", (OperatingPoint("exact", ((DENSE,) * 2,) * 3), OperatingPoint("sparse", sparse)))


@pytest.fixture(scope="module")
def there(checkpoint: Path) -> Model:
    return load_tiny(ServerConfig(model=str(checkpoint), dtype="float32", device="cuda"))


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that waits for the device fails."""
    launch, recording = Executor.launch, DecodeGraphs._recording

    def watched(executor: Executor, *given: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(executor, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def recorded(graphs: DecodeGraphs, *key: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")  # recording may wait, replaying may not
        try:
            return recording(graphs, *key)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr(Executor, "launch", watched)
    monkeypatch.setattr(DecodeGraphs, "_recording", recorded)


def answers(checkpoint: Path, there: Model, graphs: bool, ahead: bool) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    options: dict[str, Any] = {"cuda_graphs": graphs, "async_scheduling": ahead, "device": "cuda"}
    with running_engine(checkpoint, model=there, policy=policy(), **options) as engine:
        assert (engine._loop.executor.graphs is not None) is graphs and engine._loop.ahead is ahead
        found = []
        for points in (("exact",) * 4, ("sparse",) * 4, ("sparse", "exact") * 2):
            asked = [
                ask(engine, p, point=at, max_tokens=40, **kind)
                for p, at, kind in zip(prompts, points, KINDS, strict=True)
            ]
            found += [answer.tokens() for answer in asked]
        if graphs:
            recorded = engine._loop.executor.graphs
            assert recorded is not None and any(recorded._made.values()) and not recorded.broken
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_fused_kernels_compute_what_others_do(tmp_path: Path, family: str) -> None:
    pytest.importorskip("liger_kernel")
    tokens = torch.randint(4, VOCAB, (1, 90), device="cuda")
    found = []
    for fused in (False, True):
        model = load_model(
            str(save_tiny_model(tmp_path, family)),
            revision=None,
            dtype="float32",
            device=torch.device("cuda"),
            served_length=None,
            fused=fused,
            report=lambda line: None,
        )
        model.module.set_attn_implementation("sdpa")  # type: ignore[operator]
        with torch.inference_mode():
            found.append(model.module(input_ids=tokens, use_cache=False).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_steps_answer_alike(checkpoint: Path, there: Model, strict: None) -> None:
    """Recorded or not, in turn or one ahead."""
    expected = answers(checkpoint, there, False, False)
    for graphs, ahead in ((True, True), (True, False), (False, True)):
        assert answers(checkpoint, there, graphs, ahead) == expected
