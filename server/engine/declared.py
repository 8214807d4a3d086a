"""The heads of a model as its config.json declares them, for commands that read no weights. The server itself asks the
loaded layers (`gossamer.server.engine.model`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gossamer.kernels.rotary import Rotary
from gossamer.server.engine.families import StartupError


@dataclass(frozen=True, slots=True)
class DeclaredShape:
    """What a policy file is checked against."""

    model_type: str
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int


def declared_shape(config: PreTrainedConfig) -> DeclaredShape:
    """For the families that are served. Raises StartupError for a config that does not say."""
    layers, query_heads = _number(config, "num_hidden_layers"), _number(config, "num_attention_heads")
    said = getattr(config, "num_key_value_heads", None)
    kv_heads = query_heads if said is None else _number(config, "num_key_value_heads")
    if getattr(config, "head_dim", None) is None:
        head_dim = _number(config, "hidden_size") // query_heads
    else:
        head_dim = _number(config, "head_dim")
    return DeclaredShape(config.model_type, layers, kv_heads, query_heads, head_dim)


def _number(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise StartupError(f"config.json gives {value!r} as its {name}, not a number of at least 1; copy it again.")
    return value


def declared_rotary(config: PreTrainedConfig) -> Rotary | None:
    """How the model turns its keys, None where the config does not say or its layers turn them differently. RoPE that
    chooses its frequencies by length is that of the longest sequence, as when the whole length is served."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in parameters.values() if isinstance(each, Mapping)]
    if not parameters or any(each != kinds[0] for each in kinds):
        return None
    rope = kinds[0] if kinds else parameters
    kind = str(rope.get("rope_type", "default"))
    if kind == "default" and "rope_theta" in rope:
        share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        turned = int(declared_shape(config).head_dim * share)
        return Rotary(float(rope["rope_theta"]) ** -(torch.arange(0, turned, 2).float() / turned))
    if kinds or kind not in ROPE_INIT_FUNCTIONS:
        return None
    longest = int(getattr(config, "max_position_embeddings", 0)) or None
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), longest)
    return Rotary(frequencies.float(), float(scaling))


def full_layers(config: PreTrainedConfig) -> tuple[int, ...] | None:
    """The layers without a sliding window of their own; None where the config does not tell layers apart."""
    kinds = getattr(config, "layer_types", None)
    return None if not kinds else tuple(n for n, kind in enumerate(kinds) if kind == "full_attention")
