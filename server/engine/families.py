"""Which models can be served, by the `model_type` of their config.json, and why others cannot."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SUPPORTED: tuple[str, ...] = (
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)

_WHY_NOT: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_v2": "its attention is latent (MLA), which is not built yet",
        "deepseek_v3": "its attention is latent (MLA), which is not built yet",
        "falcon_mamba": "its layers carry recurrent state",
        "gemma3": "it reads images; serve the text model alone (model_type gemma3_text)",
        "jamba": "some of its layers carry recurrent state",
        "llama4": "its chunked layers and its images are not built yet",
        "llama4_text": "its chunked layers are not built yet",
        "mamba": "its layers carry recurrent state",
        "mamba2": "its layers carry recurrent state",
        "qwen3_next": "some of its layers carry recurrent state",
        "rwkv": "its layers carry recurrent state",
        "t5": "it needs cross-attention",
        "whisper": "it needs cross-attention",
    }
)

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


class StartupError(Exception):
    """The server cannot start. The message is one sentence that says what to do."""


def check_family(config: Mapping[str, Any]) -> None:
    """config: the parsed config.json. Raises StartupError when the model cannot be served."""
    family = config.get("model_type")
    if not isinstance(family, str):
        raise StartupError("config.json names no model_type; give a complete Hugging Face model directory.")
    if family not in SUPPORTED:
        why = f": {_WHY_NOT[family]}" if family in _WHY_NOT else ""
        raise StartupError(
            f"Models of the family {family!r} cannot be served{why}. Served are: {', '.join(SUPPORTED)}."
        )
    unknown = sorted(set(config.get("layer_types") or ()) - _KNOWN_LAYERS)
    if unknown:
        raise StartupError(f"This {family} model has layers of kind {', '.join(unknown)}, which cannot be served.")
    if "auto_map" in config:
        # transformers would ignore it with trust_remote_code off; what the author meant would still be missing.
        raise StartupError(
            "This checkpoint brings Python code of its own (auto_map), which is never run; use one that does not."
        )
