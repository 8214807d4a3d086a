"""Reading a text under an operating point, outside of a server."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from gossamer.attention.policy import AttentionPolicy, HeadPolicy, OperatingPoint, dense_policy
from gossamer.attention.profiling.reading import LayerCall, Reader, shape_of
from gossamer.attention.selectors import Dense, SinkRecent
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent

TOKENS = torch.randint(4, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist()


def load(folder: Path, family: str) -> Any:
    save_tiny_model(folder, family)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory.mktemp("model"), "llama")


def everywhere(model: Any, head: HeadPolicy) -> AttentionPolicy:
    shape = shape_of(model)
    return AttentionPolicy("one", (OperatingPoint("one", ((head,) * shape.kv_heads,) * shape.layers),))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_dense_reading_gives_the_models_own_logits(family: str, tmp_path: Path) -> None:
    model = load(tmp_path, family)
    shape = shape_of(model)
    reader = Reader(model, dense_policy(shape.layers, shape.kv_heads), room=256, chunk=70)
    rows = [0, 69, 70, 150, 199]
    found = reader.read(TOKENS, prompt=180, rows=rows).logits
    with torch.no_grad():
        own = model(torch.tensor([TOKENS]), attention_mask=torch.ones(1, 200)).logits[0, rows]
    torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3)


def test_shape_names_the_layers_with_windows(tmp_path: Path) -> None:
    shape = shape_of(load(tmp_path, "gemma2"))
    windows = [window is not None for window in shape.windows]
    assert any(windows)
    assert not all(windows)
    assert shape.free == tuple(layer for layer, window in enumerate(windows) if not window)


def test_a_common_beginning_is_read_once(model: Any) -> None:
    seen: list[int] = []

    class Counting:
        def layer(self, call: LayerCall) -> None:
            if call.layer == 0:
                seen.append(call.q.shape[0])

    policy = everywhere(model, HeadPolicy(SinkRecent(64, 64), SinkRecent(64, 64), KeepSinkRecent(64, 64)))
    reader = Reader(model, policy, room=600, watcher=Counting())
    other = TOKENS[:150] + TOKENS[100:140]
    reader.read(TOKENS, prompt=190, rows=[189, 195])
    again = reader.read(other, prompt=180, rows=[179, 185])
    assert seen == [200, 190 - 128]
    fresh = Reader(model, policy, room=600).read(other, prompt=180, rows=[179, 185])
    torch.testing.assert_close(again.logits, fresh.logits, rtol=1e-4, atol=1e-4)


def test_generated_tokens_ask_the_decode_selector(model: Any) -> None:
    shape = shape_of(model)
    policy = everywhere(model, HeadPolicy(Dense(), SinkRecent(1, 1), KeepAll()))
    reads = Reader(model, policy, room=256).read(TOKENS, prompt=190, rows=[189]).reads
    assert reads.prefill_read == reads.prefill_possible > 0
    heads = shape.layers * shape.kv_heads
    assert reads.decode_possible == 10 * 4 * heads - 2 * heads  # four pages from position 192 on, three before
    assert reads.decode_read == 10 * 2 * heads


def test_the_models_own_attention_is_put_back(model: Any) -> None:
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"):
        Reader(model, everywhere(model, HeadPolicy(Dense(), Dense(), KeepAll())), room=256, watcher=_Stopping()).read(
            TOKENS, prompt=200, rows=[]
        )
    assert model.config._attn_implementation == before


class _Stopping:
    def layer(self, call: LayerCall) -> None:
        raise RuntimeError("stop")
