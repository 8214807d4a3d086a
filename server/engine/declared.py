"""The heads of a model as its config.json declares them, for commands that read no weights. The server itself asks the
loaded layers (`gossamer.server.engine.model`)."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

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
