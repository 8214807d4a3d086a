"""SeerAttention's gates for prompts (Gao et al. 2024), which become a file of gates.

For each layer `attn_gate.mask_linear_k.weight` [H, 3 D, D], one key of a page for each query head, whose mean query is
taken as it is; or, with `mask_linear_q.weight` [H, D, E], `mask_linear_k.weight` [G, 3 D, E].
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.gate_files import (
    POOLED,
    GateModel,
    gate_budget,
    gate_file,
    gate_matrix,
    gate_model,
    gate_parts,
)
from gossamer.attention.importers.source import Format, Imported, Source, file_stem
from gossamer.attention.policy_backends import HeadEntry, LearnedGateBackend

KEY = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.attn_gate\.(mask_linear_[qk])\.weight")
POOLING = "Qavg_Kmaxminavg"


def _read(source: Source) -> Imported:
    parts = gate_parts(source.file, KEY)
    model = gate_model(source, parts)
    target, kind = model.target, model.config.get("seerattn_gate_type", POOLING)
    if kind != POOLING:
        raise source.refuse(f"its gates are of the type {str(kind)[:40]}; only {POOLING} can be read")
    budget, notes = gate_budget(source, model.config)
    layers: dict[str, Tensor] = {}
    for number in range(target.layers):
        query, key = _layer(source, model, parts[number], number)
        layers[f"layers.{number}.prefill.query"], layers[f"layers.{number}.prefill.key"] = query, key
    name = f"{source.name}-gates.safetensors"
    gate = LearnedGateBackend(backend="learned-gate", file=name, budget=budget, above=source.options.above or 0)
    heads = ((HeadEntry(prefill=gate),) * target.kv_heads,) * target.layers
    notes += [
        "all heads: a query block is a tile of 128 rows of a KV head's queries, and not 64 positions",
        "all heads: each page counts by the largest weight that a query head of the group gives it",
    ]
    if model.config.get("seerattn_last_block_dense", True):
        notes.append("all heads: the last two query blocks of a prompt are not dense")
    beside = {name: gate_file(layers, model.rotary, model.rotary.inv_freq)}
    return Imported(heads, tuple(notes), target.query_heads, target.head_dim, beside)


def _layer(source: Source, model: GateModel, parts: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """The gate's query [G, ratio, ratio * D, E] and key matrices of a layer."""
    target = model.target
    ratio, dim, kv_heads = target.ratio, target.head_dim, target.kv_heads
    query = torch.zeros(kv_heads, ratio, ratio, dim, dim)
    if "mask_linear_q" in parts:
        key = gate_matrix(source, parts, number, "mask_linear_k", (kv_heads, POOLED * dim, dim))
        own = gate_matrix(source, parts, number, "mask_linear_q", (kv_heads * ratio, dim, dim)).view(
            kv_heads, ratio, dim, dim
        )
    else:
        key = gate_matrix(source, parts, number, "mask_linear_k", (kv_heads * ratio, POOLED * dim, dim))
        key = key.unflatten(0, (kv_heads, ratio))
        own = torch.eye(dim).expand(kv_heads, ratio, dim, dim)
    for head in range(ratio):
        query[:, head, head] = own[:, head]
    return query.flatten(2, 3) * model.rotary.scaling**2, key  # both sides turn by the model's own table, scaling too


def _recognises(file: ForeignFile) -> bool:
    return bool(gate_parts(file, KEY))


def made_for(file: ForeignFile) -> str:
    """The config.json beside names the base model; the file itself names none."""
    base = file.config_beside().get("base_model")
    return base.rsplit("/", 1)[-1] if isinstance(base, str) else file_stem(file)


FORMAT = Format(
    "seer-attention", "SeerAttention's gates", frozenset({"budget", "threshold", "above"}), _recognises, made_for, _read
)
