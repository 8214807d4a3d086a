"""Small files in other projects' formats, for a model of 3 layers, 4 query heads, 2 KV heads of 32; and what importing
one of them gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.importers.foreign import ImportRefused
from gossamer.attention.importers.importing import Asked, Order, import_policy
from gossamer.attention.importers.source import Options
from gossamer.attention.importers.target import Target
from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.policy_backends import HeadEntry
from gossamer.attention.policy_file import PolicyFile, load_policy_file
from gossamer.kernels.rotary import Rotary

LAYERS, QUERY_HEADS, KV_HEADS, DIM = 3, 4, 2, 32
RATIO = QUERY_HEADS // KV_HEADS
ROTARY = Rotary(10000.0 ** -(torch.arange(DIM // 2) * 2 / DIM))
TINY = Target("tiny", "llama", LAYERS, KV_HEADS, QUERY_HEADS, DIM, rotary=ROTARY)


def write_config(folder: Path, family: str = "llama", **extra: Any) -> Path:
    """A folder with the config.json of the model, and no weights."""
    config = CONFIG_MAPPING[family](
        hidden_size=DIM * QUERY_HEADS,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        **{"max_position_embeddings": 2048, "pad_token_id": 1, **extra},
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    return folder


def write(path: Path, value: Any) -> Path:
    """Text as it is, tensors by torch.save, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, str):
        path.write_text(value)
    elif isinstance(value, Tensor) or (
        isinstance(value, dict) and value and all(isinstance(each, Tensor) for each in value.values())
    ):
        torch.save(value, path)
    else:
        path.write_text(json.dumps(value))
    return path


def tsv(rows: list[list[float]]) -> str:
    return "".join("\t".join(f"{value:.18e}" for value in row) + "\n" for row in rows)


def patterns(layers: int = LAYERS, heads: int = QUERY_HEADS, value: Any = None) -> list[dict[str, Any]]:
    """MInference's list, the same for every head."""
    return [{str(head): value or ["vertical_and_slash", 100, 800, 0.9] for head in range(heads)} for _ in range(layers)]


def rankings(shift: int = 0) -> dict[str, Any]:
    """DoubleSparse's object: every head ranks its channels upwards from its number times `shift`."""

    def of(heads: int) -> list[list[int]]:
        return [[(channel + head * shift) % DIM for channel in range(DIM)] for head in range(heads)]

    parts = {"q_proj": of(QUERY_HEADS), "k_proj": of(KV_HEADS), "qk_proj": of(QUERY_HEADS)}
    return {f"model.layers.{n}.self_attn.{part}": each for n in range(LAYERS) for part, each in parts.items()}


def gates(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random weights of these shapes in every layer, so small that no page gets all of the softmax."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{n}.self_attn.attn_gate.{part}.weight": 0.1 * torch.randn(shape, generator=generator)
        for n in range(LAYERS)
        for part, shape in shapes.items()
    }


def classes(**changes: Any) -> dict[str, Any]:
    """RedKnot's object: a global, a local and a retrieval layer."""
    return {
        "model": "tiny",
        "num_layers": LAYERS,
        "num_kv_heads": KV_HEADS,
        "sink_size": 4,
        "retrieval_top_p": 0.9,
        "kv_head_classification": [["global"] * KV_HEADS, ["local"] * KV_HEADS, ["retrieval"] * KV_HEADS],
        "kv_head_max_distance": [[-1] * KV_HEADS, [512] * KV_HEADS, [-1] * KV_HEADS],
        **changes,
    }


def find(model: str) -> Target:
    """The tiny model has a rotation; no other name is known."""
    assert model == "tiny"
    return TINY


def imported(
    *files: Path,
    kinds: tuple[str | None, ...] = (),
    model: str | None = "tiny",
    other_model: bool = False,
    target: Target = TINY,
    **options: Any,
) -> PolicyFile:
    """The policy that a file becomes, or two of them; written beside the first, and read again."""
    out = files[0].parent / "policy.yaml"
    asked = tuple(Asked(file, kinds[n] if n < len(kinds) else None) for n, file in enumerate(files))
    order = Order(asked, out, model, Options(**options), other_model, force=True)
    policy = import_policy(order, lambda name: target)
    again = load_policy_file(out)
    assert again == policy
    assert policy.provenance.source == "imported" and policy.provenance.note == "imported, not verified here"
    assert [each.name for each in policy.provenance.files] == [
        (file / "full_attention_heads.tsv" if file.is_dir() else file).name for file in files
    ]
    assert all(head.is_dense for head in policy.policy(Artefacts(out.parent)).points[:1])
    return policy


def heads(policy: PolicyFile) -> list[list[HeadEntry]]:
    """[layer][KV head] of the imported point."""
    return [[HeadEntry(**{part: getattr(entry, part) for part in HeadEntry.model_fields}) for entry, _ in layer]
            for layer in policy.entries("imported")]  # fmt: skip


def meaning(policy: PolicyFile, folder: Path) -> AttentionPolicy:
    """With the files beside it."""
    return policy.policy(Artefacts(folder))


def note(policy: PolicyFile, part: str) -> str:
    """The one approximation that says this."""
    (found,) = [each for each in policy.provenance.approximations if part in each]
    return found


def refusal(*files: Path, **options: Any) -> str:
    """The sentence with which a file is refused; nothing is written."""
    out = files[0].parent / "policy.yaml"
    with pytest.raises(ImportRefused) as caught:
        imported(*files, **options)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 700
    assert not out.exists() and not list(files[0].parent.glob("*.safetensors"))
    return sentence
