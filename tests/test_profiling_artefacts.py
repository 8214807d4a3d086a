"""What policies read beside themselves: captured attention, label channels, distilled gates."""

import random
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_cases import paged
from tiny_models import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy import dense_policy
from gossamer.attention.profiling.capture import Captured, capture
from gossamer.attention.profiling.gate_training import Lessons, rotary_of
from gossamer.attention.profiling.gates import (
    GateWeights,
    Lesson,
    Phase,
    distil,
    divergence,
    lesson,
    write_gates,
)
from gossamer.attention.profiling.labels import rank_channels, write_labels
from gossamer.attention.profiling.reading import Reader, shape_of
from gossamer.attention.selectors import Budget, LearnedGate
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, QueryBlocks
from gossamer.kernels.rotary import Rotary

LAYERS, GROUPS, RATIO, DIM = 3, 2, 2, 32
ROTARY = Rotary(10000.0 ** -(torch.arange(DIM // 2) * 2 / DIM))


def noise(tokens: int, seed: int) -> Captured:
    generator = torch.Generator().manual_seed(seed)
    shapes = (GROUPS * RATIO, GROUPS, GROUPS)
    return Captured(*(torch.randn(tokens, heads, DIM, generator=generator) for heads in shapes), DIM**-0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "llama")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_what_is_captured_is_what_the_layers_attend_with(model: Any) -> None:
    config, body = model.config, model.model
    tokens = torch.randint(4, 300, (200,), generator=torch.Generator().manual_seed(0))
    policy = dense_policy(config.num_hidden_layers, config.num_key_value_heads)
    before = config._attn_implementation
    in_chunks, at_once = capture(model, tokens, policy, chunk=70), capture(model, tokens, policy, chunk=1000)
    assert config._attn_implementation == before
    assert len(at_once) == config.num_hidden_layers
    with torch.no_grad():
        states = model(tokens[None], output_hidden_states=True).hidden_states
        cos, sin = body.rotary_emb(states[0], torch.arange(200)[None])
        for layer, found, state in zip(body.layers, at_once, states[:-1], strict=True):
            plain = layer.input_layernorm(state)
            attention = layer.self_attn
            projected = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (each(plain).view(1, 200, -1, found.q.shape[2]).transpose(1, 2) for each in projected)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            for mine, theirs in ((found.q, q), (found.k, k), (found.v, v)):
                torch.testing.assert_close(mine, theirs[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
    for one, other in zip(in_chunks, at_once, strict=True):
        for mine, theirs in ((one.q, other.q), (one.k, other.k), (one.v, other.v)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_lessons_of_a_text_in_chunks_are_those_of_all_of_it(model: Any) -> None:
    tokens = torch.randint(4, 300, (400,), generator=torch.Generator().manual_seed(0))
    policy = dense_policy(model.config.num_hidden_layers, model.config.num_key_value_heads)
    layers, shape = capture(model, tokens, policy), shape_of(model)
    rotary = rotary_of(model)
    assert rotary is not None
    sizes: dict[Phase, int] = {"prefill": 64, "decode": 1}
    first = {"prefill": [64, 192, 384], "decode": [130, 255, 256, 399]}
    watcher = Lessons(rotary, 400, (0, 2), sizes, {phase: first[phase] for phase in sizes})
    Reader(model, policy, room=400, chunk=128, shape=shape, watcher=watcher).read(tokens.tolist(), prompt=400, rows=())
    for phase, size in sizes.items():
        assert set(watcher.found[phase]) == {0, 2}
        for number, found in watcher.found[phase].items():
            whole = lesson(layers[number], rotary, first[phase], size)
            for mine, theirs in zip(astuple(found), astuple(whole), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_channels_are_ranked_by_their_products(tmp_path: Path) -> None:
    texts = [[noise(50, seed), noise(50, seed + 10)] for seed in range(3)]
    for layer in (0, 1):
        texts[0][layer].k[:, 1, 5] *= 20.0  # one channel of one head stands out
    ranked = rank_channels(texts)
    for layer, channels in enumerate(ranked):
        for head in range(GROUPS):
            weight = [0.0] * DIM
            for text in texts:
                q, k = text[layer].q.double(), text[layer].k.double()
                for t in range(50):
                    for j in range(RATIO):
                        for c in range(DIM):
                            weight[c] += abs(float(q[t, head * RATIO + j, c] * k[t, head, c]))
            assert channels[head].tolist() == sorted(range(DIM), key=lambda c: -weight[c])
        assert channels[1, 0] == 5
    write_labels(tmp_path / "labels.safetensors", ranked)
    labels = Artefacts(tmp_path).labels("labels.safetensors", 1, 4, GROUPS, DIM)
    assert labels.on_device.tolist() == ranked[1][:, :4].tolist()


@pytest.mark.parametrize("size", [1, 64])
def test_a_gate_is_taught_the_largest_weight_in_each_past_page(size: int) -> None:
    layer = noise(300, 1)
    layer.q.mul_(3.0)
    begins = [0, 128, 256] if size == 64 else [63, 64, 200, 299]
    taught = lesson(layer, ROTARY, begins, size)
    assert taught.past.tolist() == [begin // PAGE_SIZE for begin in begins]
    q, k = layer.q.double(), layer.k.double()
    for n, begin in enumerate(begins):
        for head in range(GROUPS):
            largest = [0.0] * (300 // PAGE_SIZE)
            for t in range(begin, min(begin + size, 300)):
                for j in range(RATIO):
                    weights = (k[: t + 1, head] @ q[t, head * RATIO + j] * layer.scale).softmax(0)
                    for page in range(begin // PAGE_SIZE):
                        best = float(weights[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].max())
                        largest[page] = max(largest[page], best)
            total = sum(largest) or 1.0
            expected = torch.tensor([each / total for each in largest])
            torch.testing.assert_close(taught.target[n, head], expected, rtol=1e-4, atol=1e-6)


def test_distilling_brings_a_gate_nearer_to_dense_on_what_it_has_not_seen() -> None:
    lessons = [lesson(needles(seed), ROTARY, range(256, 1024, 64), 64) for seed in range(12)]
    start = distil(lessons[2:], ROTARY, 0)
    learned = distil(lessons[2:], ROTARY, 150, rate=1e-2)

    def far(weights: GateWeights) -> float:
        return sum(float(divergence(weights, ROTARY, each)) for each in lessons[:2]) / 2

    assert far(learned) < 0.8 * far(start)


def needles(seed: int) -> Captured:
    """Keys of which some are large in one channel and hence found by queries that are so too."""
    made = noise(1024, seed)
    rng = random.Random(seed)
    for at in rng.sample(range(1024), 24):
        made.k[at, :, 31] += 30.0
    made.q[:, :, 31] += 3.0
    return made


@pytest.mark.parametrize(("phase", "size"), [("prefill", 64), ("decode", 1)])
def test_a_gate_that_was_written_chooses_as_it_was_taught(tmp_path: Path, phase: Phase, size: int) -> None:
    layer, begin = noise(640, 4), 576
    lessons = [lesson(layer, ROTARY, [begin], size)]
    weights = distil(lessons, ROTARY, 20, rate=1e-2)
    weights = GateWeights(weights.query.bfloat16().float(), weights.key.bfloat16().float())
    write_gates(tmp_path / "gates.safetensors", [{phase: weights}], ROTARY, ROTARY)
    gate = Artefacts(tmp_path).gate("gates.safetensors", 0, phase, GROUPS, DIM)
    selector = LearnedGate(gate.keys, Budget("tokens", 4 * PAGE_SIZE), gate.query, gate.norm, phase)
    kv = paged(layer, selector.summaries)
    blocks = QueryBlocks.of(size, [BlockRow(0, 0, begin, size)])
    chosen = selector.propose(layer.q[begin : begin + size], kv, blocks, layer.scale).pages[:, 0]
    wanted = guess(weights, lessons[0])[0]
    wanted[:, 0] = torch.inf  # the first page is always read
    # four pages in all, of which the block's own and the first are two
    expected = torch.zeros_like(chosen)
    expected[:, : wanted.shape[1]].scatter_(1, wanted.topk(3).indices, True)
    assert torch.equal(chosen, expected)


def guess(weights: GateWeights, taught: Lesson) -> Tensor:
    """[N, G, L], the logits of the gate, -inf where a page is not past, by the formula."""
    queries = torch.einsum("ngd,gde->nge", taught.queries, weights.query[:, 0])
    queries = ROTARY.turn(queries, taught.origin[:, None].expand(queries.shape[:2]))
    places = (torch.arange(taught.pages.shape[1]) * PAGE_SIZE).expand(taught.pages.shape[:2])
    logits = torch.einsum("nge,gle->ngl", queries, ROTARY.turn(taught.pages @ weights.key, places))
    return logits.masked_fill(torch.arange(logits.shape[2]) >= taught.past[:, None, None], -torch.inf)
