"""SeerAttention-R's gates for generated tokens (Gao et al. 2025), which become a file of gates.

For each layer `attn_gate.attngate_linear_k.weight` [G, 3 D, E], and of the group's queries one of: `attngate_linear_q`
[G, ratio, D, E]; `attngate_linear_q` [G, D, E] of their mean; their mean as it is, E = D. Optionally
`attngate_{q,k}norm.weight` [E].
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
from gossamer.attention.importers.seer_attention import made_for
from gossamer.attention.importers.source import DENSE_HEAD, Format, Imported, Source, is_whole
from gossamer.attention.policy_backends import HeadEntry, LearnedGateBackend

KEY = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.attn_gate\.(attngate_linear_[qk]|attngate_[qk]norm)\.weight")
POOLING = "Kmaxminavg"


def _read(source: Source) -> Imported:
    parts = gate_parts(source.file, KEY)
    model = gate_model(source, parts)
    target, config = model.target, model.config
    kind = config.get("seerattn_k_seq_pooling_type", POOLING)
    if kind != POOLING:
        raise source.refuse(f"its gates pool keys by {str(kind)[:40]}; only {POOLING} can be read")
    budget, notes = gate_budget(source, config)
    first, window = (config.get(f"seerattn_{name}", 0) for name in ("start_layer", "sliding_window_size"))
    if not is_whole(first) or not is_whole(window) or not 0 <= first <= target.layers or not 0 <= window <= 2**30:
        raise source.refuse("the config.json beside it has an impossible seerattn_start_layer or _sliding_window_size")
    turns = config.get("seerattn_use_rope", True) is not False
    layers: dict[str, Tensor] = {}
    for number in range(target.layers):
        for part, tensor in _layer(source, model, parts[number], number, turns=turns).items():
            layers[f"layers.{number}.decode.{part}"] = tensor
    name = f"{source.name}-gates.safetensors"
    gate = LearnedGateBackend(
        backend="learned-gate",
        file=name,
        budget=budget.model_copy(update={"recent": window}),
        above=source.options.above or 0,
    )
    heads = tuple(
        ((HeadEntry(decode=gate) if number >= first else DENSE_HEAD),) * target.kv_heads
        for number in range(target.layers)
    )
    notes.append("all heads: a page's key is rotated to the page's first position, also when it fills while decoding")
    frequencies = model.rotary.inv_freq if turns else torch.zeros_like(model.rotary.inv_freq)
    beside = {name: gate_file(layers, model.rotary, frequencies)}
    return Imported(heads, tuple(notes), target.query_heads, target.head_dim, beside)


def _layer(
    source: Source, model: GateModel, parts: Mapping[str, Tensor], number: int, *, turns: bool
) -> dict[str, Tensor]:
    """query [G, 1, ratio * D, E], key [G, 3 D, E], and the norms where there are some."""
    target = model.target
    ratio, dim, kv_heads = target.ratio, target.head_dim, target.kv_heads
    found = {"key": gate_matrix(source, parts, number, "attngate_linear_k", (kv_heads, POOLED * dim, dim))}
    if "attngate_linear_q" not in parts:
        query = torch.eye(dim).expand(kv_heads, dim, dim)
    elif parts["attngate_linear_q"].dim() == 3:
        query = gate_matrix(source, parts, number, "attngate_linear_q", (kv_heads, dim, dim))
    else:
        query = gate_matrix(source, parts, number, "attngate_linear_q", (kv_heads, ratio, dim, dim))
    if query.dim() == 3:  # of the mean over the group
        query = query[:, None].expand(-1, ratio, -1, -1) / ratio
    scaling = model.rotary.scaling**2 if turns else 1.0  # both sides turn by the model's own table, scaling too
    norms = {f"{which}_norm": f"attngate_{which[0]}norm" for which in ("query", "key")}
    if any(name in parts for name in norms.values()):
        for part, name in norms.items():
            found[part] = gate_matrix(source, parts, number, name, (dim,))
        found["query_norm"] = found["query_norm"] * scaling
    else:
        query = query * scaling
    found["query"] = query.flatten(1, 2)[:, None]
    return found


def _recognises(file: ForeignFile) -> bool:
    return bool(gate_parts(file, KEY))


FORMAT = Format(
    "seer-attention-r", "SeerAttention-R's gates", frozenset({"budget", "threshold", "above"}), _recognises, made_for,
    _read,
)  # fmt: skip
