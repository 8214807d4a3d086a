"""Profiles that need a file beside the policy: DoubleSparse's channels, SeerAttention's and SeerAttention-R's gates."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_cases import paged
from foreign_files import (
    DIM,
    KV_HEADS,
    LAYERS,
    QUERY_HEADS,
    RATIO,
    ROTARY,
    TINY,
    gates,
    heads,
    imported,
    meaning,
    note,
    rankings,
    refusal,
    write,
    write_config,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.attention.policy_backends import HeadEntry
from gossamer.attention.profiling.capture import Captured
from gossamer.attention.selectors import DoubleSparsity, LearnedGate
from gossamer.attention.selectors.budget import Budget
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, QueryBlocks
from gossamer.kernels.rotary import Rotary

HALF = DIM // 2

# --- DoubleSparse


def shuffled(seed: int) -> dict[str, Any]:
    """Every head ranks its channels by chance."""
    rng = random.Random(seed)
    return {key: [rng.sample(range(DIM), DIM) for _ in lists] for key, lists in rankings().items()}


def test_channels_of_a_group_are_those_of_least_places_with_their_partners(tmp_path: Path) -> None:
    said = shuffled(0)
    policy = imported(write(tmp_path / "x.json", said), budget=2048, above=8192, channels=6)
    stored = load_file(tmp_path / "policy-labels.safetensors")
    for layer in range(LAYERS):
        for group in range(KV_HEADS):
            lists = said[f"model.layers.{layer}.self_attn.qk_proj"][group * RATIO : (group + 1) * RATIO]
            order = sorted(range(DIM), key=lambda channel: sum(each.index(channel) for each in lists))
            expected: list[int] = []
            for channel in order:
                expected += [c for c in (channel, (channel + HALF) % DIM) if c not in expected]
            assert stored[f"layers.{layer}"][group].tolist() == expected
    sparse = {
        "backend": "double-sparsity",
        "file": "policy-labels.safetensors",
        "channels": 6,
        "tokens": 2048,
        "above": 8192,
    }
    expected_heads = [[HeadEntry()] * 2] * 2 + [[HeadEntry.model_validate({"decode": sparse})] * 2]
    assert heads(policy) == expected_heads  # the first two layers are dense, as in the reference
    assert note(policy, "rank other channels (qk_proj)").startswith("all 6 KV heads")
    selector = meaning(policy, tmp_path).point("imported").heads[2][1].decode
    assert isinstance(selector, DoubleSparsity)
    assert selector.labels.on_device[1].tolist() == stored["layers.2"][1, :6].tolist()


def test_which_ranking_is_taken(tmp_path: Path) -> None:
    """qk_proj before q_proj; k_proj only where keys are not shared."""
    said = shuffled(1)
    without = {key: value for key, value in said.items() if "qk_proj" not in key}
    file = write(tmp_path / "x.json", without)
    assert "(q_proj)" in note(imported(file, budget=64), "rank other channels")
    (tmp_path / "policy.yaml").unlink()
    (tmp_path / "policy-labels.safetensors").unlink()
    keys = {key: value for key, value in said.items() if "k_proj" in key and "qk" not in key}
    assert "channels of shared keys alone (k_proj)" in refusal(write(file, keys), budget=64)
    assert "how many query heads share a KV head; give --model" in refusal(file, budget=64, model=None)
    own = replace(TINY, kv_heads=QUERY_HEADS)
    each = {key.replace("q_proj", "k_proj"): value for key, value in said.items() if key.endswith(".q_proj")}
    policy = imported(write(file, each), budget=64, target=own)
    assert policy.model.kv_heads == QUERY_HEADS and "(k_proj)" in note(policy, "rank other channels")


def test_shapes_are_known_without_a_model(tmp_path: Path) -> None:
    said = {**rankings(), "model.layers.0.mlp.down_proj": [[1]], "model.layers.0.self_attn.v_proj": [[1]]}
    policy = imported(write(tmp_path / "x.json", said), budget=64, model=None)
    model = policy.model
    assert (model.name, model.layers, model.kv_heads, model.query_heads, model.head_dim) == (None, 3, 2, 4, DIM)
    assert note(policy, "rank other channels").startswith("0 of 6 KV heads")


def test_rotation_of_a_part_of_the_channels(tmp_path: Path) -> None:
    """Channels that RoPE leaves alone have no partner."""
    partial = replace(TINY, rotary=Rotary(ROTARY.inv_freq[:4]))
    imported(write(tmp_path / "x.json", rankings()), budget=64, target=partial)
    stored = load_file(tmp_path / "policy-labels.safetensors")["layers.0"][0].tolist()
    assert stored[:10] == [0, 4, 1, 5, 2, 6, 3, 7, 8, 9]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.1.self_attn.qk_proj": [[0] * DIM] * 4}, "its qk_proj of layer 1 is no ranking of all channels"),
        ({"model.layers.1.self_attn.qk_proj": [[0.5] * DIM] * 4}, "its qk_proj of layer 1 is no ranking"),
        ({"model.layers.1.self_attn.qk_proj": 5}, "its qk_proj of layer 1 is no ranking"),
        ({"model.layers.1.self_attn.qk_proj": [list(range(DIM))] * 2}, "its layers differ in heads or channels"),
        ({"model.layers.99999.self_attn.qk_proj": [[0]]}, "it has 100000 layers, of which some have no ranking"),
        ({f"model.layers.{n}.self_attn.qk_proj": [list(range(64))] * 4 for n in range(3)}, "head_dim 64, but tiny has"),
        ({f"model.layers.{n}.self_attn.qk_proj": [list(range(DIM))] * 8 for n in range(3)}, "query_heads 8, but tiny"),
    ],
)  # fmt: skip
def test_rankings_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert said in refusal(write(tmp_path / "x.json", {**rankings(), **change}), budget=64)


def test_how_many_tokens_has_to_be_said(tmp_path: Path) -> None:
    assert "not how many tokens to read; give --budget" in refusal(write(tmp_path / "x.json", rankings()))


# --- gates

PREFILL = {"mask_linear_k": (QUERY_HEADS, 3 * DIM, DIM)}
DOUBLE = {"mask_linear_q": (QUERY_HEADS, DIM, DIM), "mask_linear_k": (KV_HEADS, 3 * DIM, DIM)}
DECODE = {"attngate_linear_q": (KV_HEADS, RATIO, DIM, DIM), "attngate_linear_k": (KV_HEADS, 3 * DIM, DIM)}
NORMED = {**DECODE, "attngate_qnorm": (DIM,), "attngate_knorm": (DIM,)}
MEAN = {**DECODE, "attngate_linear_q": (KV_HEADS, DIM, DIM)}
PLAIN = {"attngate_linear_k": (KV_HEADS, 3 * DIM, DIM)}
LENGTH = 640


def part(weights: dict[str, Tensor], layer: int, name: str) -> Tensor:
    return weights[f"model.layers.{layer}.self_attn.attn_gate.{name}.weight"].bfloat16().double()


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """x [T, H, D] as the model's rotation turns it at these positions [T]."""
    angle = places.double()[:, None, None] * ROTARY.inv_freq.double()
    low, high = x[..., :HALF], x[..., HALF:]
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)


def before_rotation(seed: int) -> tuple[Tensor, Tensor, Captured]:
    """q [T, H, D] and k [T, G, D] of one layer before RoPE, and what the model attends with."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(LENGTH, n, DIM, generator=generator).double() for n in (QUERY_HEADS, KV_HEADS))
    places = torch.arange(LENGTH)
    turned = [rotated(each, places).float() for each in (q, k)]
    return q, k, Captured(*turned, torch.randn(LENGTH, KV_HEADS, DIM, generator=generator), DIM**-0.5)


def pooled_keys(k: Tensor) -> Tensor:
    """[pages, G, 3 D]: maximum, minimum and mean, as both papers' code joins them."""
    pages = k.unflatten(0, (LENGTH // PAGE_SIZE, PAGE_SIZE))
    return torch.cat((pages.amax(1), pages.amin(1), pages.mean(1)), -1)


def chosen(selector: Any, layer: Captured, begin: int, size: int, budget: Budget) -> Tensor:
    """[G, L], the pages that a budget admits."""
    assert isinstance(selector, LearnedGate)
    selector = replace(selector, budget=budget)
    blocks = QueryBlocks.of(size, [BlockRow(0, 0, begin, size)])
    kv = paged(layer, selector.summaries)
    return selector.propose(layer.q[begin : begin + size], kv, blocks, layer.scale).pages[:, 0]


def check_choices(selector: Any, layer: Captured, begin: int, size: int, mass: Tensor) -> None:
    """mass [G, past pages], the published weights of the past pages: by count, where the first page always counts
    and the block's own takes one place, and by weight."""
    past, empty = mass.shape[1], torch.zeros(KV_HEADS, LENGTH // PAGE_SIZE, dtype=torch.bool)
    for count in (2, 4, 6):
        ranked = mass.clone()
        ranked[:, 0] = torch.inf
        expected = empty.scatter(1, ranked.topk(count - 1).indices, True)
        assert torch.equal(chosen(selector, layer, begin, size, Budget("tokens", count * PAGE_SIZE)), expected)
    middle = mass.flatten().sort().values
    for low, high in ((past // 2, past // 2 + 1), (past, past + 1)):
        weight = float(middle[low] + middle[high]) / 2
        expected = empty.clone()
        expected[:, :past] = mass >= weight
        assert torch.equal(chosen(selector, layer, begin, size, Budget("weight", weight)), expected)


@pytest.mark.parametrize("shapes", [PREFILL, DOUBLE], ids=["one matrix", "two"])
def test_a_gate_for_prompts_scores_as_published(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Block means of q, pooled k, one projection per query head, RoPE at block starts, softmax; ours then takes the
    largest of the group."""
    weights = gates(**shapes)
    policy = imported(write(tmp_path / "attn_gate_weights.pth", weights), budget=256)
    q, k, layer = before_rotation(1)
    begin, starts = 576, torch.arange(LENGTH // PAGE_SIZE) * PAGE_SIZE
    for number in (0, 2):
        asked = q[begin : begin + PAGE_SIZE].mean(0)  # [H, D]
        if "mask_linear_q" in shapes:
            asked = torch.einsum("hd,hde->he", asked, part(weights, number, "mask_linear_q"))
        matrix = part(weights, number, "mask_linear_k")
        each = matrix if matrix.shape[0] == QUERY_HEADS else matrix.repeat_interleave(RATIO, 0)
        pooled = pooled_keys(k).repeat_interleave(RATIO, 1)
        keys = rotated(torch.einsum("lhi,hie->lhe", pooled, each), starts)
        logits = torch.einsum("he,lhe->hl", rotated(asked[None], torch.tensor([begin]))[0], keys) * DIM**-0.5
        weight = logits[:, : begin // PAGE_SIZE].softmax(-1)
        mass = weight.unflatten(0, (KV_HEADS, RATIO)).amax(1)
        selector = meaning(policy, tmp_path).point("imported").heads[number][0].prefill
        check_choices(selector, layer, begin, PAGE_SIZE, mass / mass.sum(-1, keepdim=True))


@pytest.mark.parametrize("shapes", [DECODE, NORMED, MEAN, PLAIN], ids=["heads", "norms", "their mean", "plain mean"])
@pytest.mark.parametrize("turns", [True, False])
def test_a_gate_for_generated_tokens_scores_as_published(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], turns: bool
) -> None:
    """The group's queries projected together (or their mean), normed, rotated to the token; keys to block starts."""
    weights = gates(**shapes)
    write(tmp_path / "config.json", {"seerattn_use_rope": turns, "seerattn_use_qk_norm": shapes is NORMED})
    policy = imported(write(tmp_path / "attn_gate_weights.pth", weights), budget=256)
    q, k, layer = before_rotation(2)
    at, starts = 600, torch.arange(LENGTH // PAGE_SIZE) * PAGE_SIZE
    group = q[at].unflatten(0, (KV_HEADS, RATIO))
    if shapes in (DECODE, NORMED):
        asked = torch.einsum("gjd,gjde->ge", group, part(weights, 1, "attngate_linear_q"))
    else:
        asked = group.mean(1)
        asked = torch.einsum("gd,gde->ge", asked, part(weights, 1, "attngate_linear_q")) if shapes is MEAN else asked
    keys = torch.einsum("lgi,gie->lge", pooled_keys(k), part(weights, 1, "attngate_linear_k"))
    if shapes is NORMED:
        asked, keys = (
            each / (each.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * part(weights, 1, f"attngate_{which}norm")
            for each, which in ((asked, "q"), (keys, "k"))
        )
    if turns:
        asked, keys = rotated(asked[None], torch.tensor([at]))[0], rotated(keys, starts)
    logits = torch.einsum("ge,lge->gl", asked, keys) * DIM**-0.5
    mass = logits[:, : at // PAGE_SIZE].softmax(-1)
    selector = meaning(policy, tmp_path).point("imported").heads[1][0].decode
    check_choices(selector, layer, at, 1, mass)


def test_a_rotation_that_also_scales(tmp_path: Path) -> None:
    """YaRN's factor is in both sides of a gate's products."""
    weights = write(tmp_path / "attn_gate_weights.pth", gates(**PREFILL))
    imported(weights, budget=64)
    plain = load_file(tmp_path / "policy-gates.safetensors")["layers.0.prefill.query"].float()
    policy = imported(weights, budget=64, target=replace(TINY, rotary=Rotary(ROTARY.inv_freq, 1.5)))
    scaled = load_file(tmp_path / "policy-gates.safetensors")["layers.0.prefill.query"].float()
    torch.testing.assert_close(scaled, plain * 2.25)
    selector = meaning(policy, tmp_path).point("imported").heads[0][0].prefill
    assert isinstance(selector, LearnedGate) and selector.keys.rotary.scaling == 1.5
    assert selector.keys.turned.scaling == 1.0
    file = write(tmp_path / "other" / "attn_gate_weights.pth", gates(**NORMED))
    imported(file, budget=64, target=replace(TINY, rotary=Rotary(ROTARY.inv_freq, 1.5)))
    stored = load_file(tmp_path / "other" / "policy-gates.safetensors")
    wanted = part(gates(**NORMED), 0, "attngate_qnorm") * 2.25
    torch.testing.assert_close(stored["layers.0.decode.query_norm"].double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("config", "options", "budget"),
    [
        ({"seerattn_sparsity_method": "threshold", "seerattn_threshold": 5e-4}, {}, {"weight": 5e-4}),
        ({"seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.25}, {}, {"share": 0.25}),
        ({"seerattn_sparsity_method": "token_budget", "seerattn_token_budget": 4096}, {}, {"tokens": 4096}),
        ({"seerattn_threshold": 5e-4}, {"budget": 1024}, {"tokens": 1024}),
        ({}, {"threshold": 0.002}, {"weight": 0.002}),
    ],
)
def test_how_much_is_read(
    tmp_path: Path, config: dict[str, Any], options: dict[str, Any], budget: dict[str, Any]
) -> None:
    write(tmp_path / "config.json", config)
    policy = imported(write(tmp_path / "attn_gate_weights.pth", gates(**PREFILL)), above=4096, **options)
    gate = {"backend": "learned-gate", "file": "policy-gates.safetensors", "budget": budget, "above": 4096}
    assert heads(policy) == [[HeadEntry.model_validate({"prefill": gate})] * KV_HEADS] * LAYERS


def test_first_layers_and_windows_of_the_gates_for_generated_tokens(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"seerattn_start_layer": 2, "seerattn_sliding_window_size": 128})
    policy = imported(write(tmp_path / "attn_gate_weights.pth", gates(**DECODE)), budget=512)
    budget = {"tokens": 512, "recent": 128}
    gate = {"backend": "learned-gate", "file": "policy-gates.safetensors", "budget": budget}
    assert heads(policy) == [[HeadEntry()] * 2] * 2 + [[HeadEntry.model_validate({"decode": gate})] * 2]


def test_gates_of_both_phases_share_a_file(tmp_path: Path) -> None:
    files = [
        write(tmp_path / name / "attn_gate_weights.pth", gates(**shapes))
        for name, shapes in (("p", PREFILL), ("d", DECODE))
    ]
    policy = imported(*files, budget=256)
    gate = {"backend": "learned-gate", "file": "policy-gates.safetensors", "budget": {"tokens": 256}}
    assert heads(policy) == [[HeadEntry.model_validate({"prefill": gate, "decode": gate})] * KV_HEADS] * LAYERS
    both = meaning(policy, files[0].parent).point("imported").heads[0][0]
    assert isinstance(both.prefill, LearnedGate) and isinstance(both.decode, LearnedGate)
    write(files[1].with_name("config.json"), {"seerattn_use_rope": False})
    for each in (files[0].parent / "policy.yaml", files[0].parent / "policy-gates.safetensors"):
        each.unlink()
    assert "do not turn alike" in refusal(*files, budget=256)


def test_gates_as_safetensors_or_with_a_folder(tmp_path: Path) -> None:
    weights = gates(**PREFILL)
    torch_file = write(tmp_path / "attn_gate_weights.pth", weights)
    save_file(weights, tmp_path / "gates.safetensors")
    assert imported(tmp_path / "gates.safetensors", budget=64).points == imported(torch_file, budget=64).points
    assert imported(tmp_path / "attn_gate_weights.pth", budget=64).points == imported(torch_file, budget=64).points


BAD: dict[str, tuple[Callable[[str, Tensor], tuple[str, Tensor] | None], str]] = {
    "another number of layers": (lambda k, v: None if ".2." in k else (k, v), "gates of 2 layers, and tiny has 3"),
    "another shape": (lambda k, v: (k, v[:, :, :8]), "has the shape [4, 96, 8], and not [4, 96, 32]"),
    "NaN": (lambda k, v: (k, v * torch.nan), "does not hold finite numbers"),
    "integers": (lambda k, v: (k, v.int()), "does not hold finite numbers"),
    "a part missing": (lambda k, v: (k.replace("_k", "_q"), v), "layer 0 has no mask_linear_k"),
}


@pytest.mark.parametrize("change", BAD)
def test_gates_that_cannot_be_used(tmp_path: Path, change: str) -> None:
    change_one, said = BAD[change]
    changed = [change_one(name, tensor) for name, tensor in gates(**PREFILL).items()]
    file = write(tmp_path / "x.pth", dict(each for each in changed if each is not None))
    assert said in refusal(file, budget=64)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"seerattn_gate_type": "Qmax_Kavg"}, "its gates are of the type Qmax_Kavg; only Qavg_Kmaxminavg"),
        ({"seerattn_gate_block_size": 16}, "judge blocks of 16 tokens, and pages have 64"),
        ({"seerattn_sparsity_method": "threshold", "seerattn_threshold": 0}, "says how much to read; give --budget"),
        ({}, "says how much to read; give --budget"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    write(tmp_path / "config.json", config)
    options = {} if "how much" in said else {"budget": 64}
    assert said in refusal(write(tmp_path / "x.pth", gates(**PREFILL)), **options)


def test_gates_need_the_rotation(tmp_path: Path) -> None:
    file = write(tmp_path / "x.pth", gates(**PREFILL))
    for options in ({"model": None}, {"target": replace(TINY, rotary=None)}):
        assert "give --model DIRECTORY, with its config.json" in refusal(file, budget=64, **options)  # type: ignore[arg-type]
    assert "two ways to say one thing" in refusal(file, budget=64, threshold=0.1)


SHORT = {"original_max_position_embeddings": 512}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 1e4}),
        ("llama", {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}),
        ("llama", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **BANDS, **SHORT}),
        ("qwen3", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, **SHORT}),
        ("phi3", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ],
)
def test_the_declared_rotation_is_the_models_own(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from gossamer.server.engine.declared import declared_rotary

    config = AutoConfig.from_pretrained(
        write_config(tmp_path, family, vocab_size=64, intermediate_size=32, rope_parameters=rope)
    )
    found = declared_rotary(config)
    embedding = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert found is not None and found.scaling == pytest.approx(float(embedding.attention_scaling))
    torch.testing.assert_close(found.inv_freq, embedding.inv_freq.float())


def test_layers_that_turn_differently_have_no_one_rotation(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from gossamer.server.engine.declared import declared_rotary, full_layers

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = AutoConfig.from_pretrained(write_config(tmp_path, "gemma3_text", layer_types=kinds))
    assert declared_rotary(config) is None and full_layers(config) == (1,)
