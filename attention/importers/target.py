"""The model that a foreign profile is for: what its config.json declares, or what is known of a published one."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gossamer.attention.packaged import spelled
from gossamer.kernels.rotary import Rotary


@dataclass(frozen=True, slots=True)
class Target:
    """A model, as far as it is known."""

    name: str
    model_type: str | None
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    full_layers: tuple[int, ...] | None = None  # those without a sliding window of their own; None: all
    rotary: Rotary | None = None  # from a config.json only

    @property
    def ratio(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads


# Models that published profiles are for, by the names that they have on the Hugging Face Hub.
PUBLISHED: tuple[Target, ...] = (
    Target("Llama-2-7B-32K-Instruct", "llama", 32, 32, 32, 128),
    Target("Meta-Llama-3-8B-Instruct", "llama", 32, 8, 32, 128),
    Target("Llama-3-8B-Instruct-262k", "llama", 32, 8, 32, 128),
    Target("Llama-3-8B-Instruct-Gradient-1048k", "llama", 32, 8, 32, 128),
    Target("Llama-3-8B-Instruct-Gradient-4194k", "llama", 32, 8, 32, 128),
    Target("Llama-3.1-8B-Instruct", "llama", 32, 8, 32, 128),
    Target("Llama-3.1-70B-Instruct", "llama", 80, 8, 64, 128),
    Target("Llama-3.3-70B-Instruct", "llama", 80, 8, 64, 128),
    Target("Mistral-7B-Instruct-v0.2", "mistral", 32, 8, 32, 128),
    Target("Mistral-7B-Instruct-v0.3", "mistral", 32, 8, 32, 128),
    Target("Mixtral-8x7B-Instruct-v0.1", "mixtral", 32, 8, 32, 128),
    Target("Phi-3-mini-128k-instruct", "phi3", 32, 32, 32, 96),
    Target("Qwen2-7B-Instruct", "qwen2", 28, 4, 28, 128),
    Target("Qwen2.5-7B-Instruct", "qwen2", 28, 4, 28, 128),
    Target("Qwen2.5-7B-Instruct-1M", "qwen2", 28, 4, 28, 128),
    Target("Qwen2.5-14B-Instruct-1M", "qwen2", 48, 8, 40, 128),
    Target("Qwen2.5-32B-Instruct", "qwen2", 64, 8, 40, 128),
    Target("Qwen2.5-72B-Instruct", "qwen2", 80, 8, 64, 128),
    Target("Qwen3-32B", "qwen3", 64, 8, 64, 128),
)

# Models for which their authors use the profile of another one.
SHARED: Mapping[str, str] = MappingProxyType(
    {
        "Llama-3-8B-Instruct-Gradient-1048k": "Llama-3-8B-Instruct-262k",
        "Llama-3-8B-Instruct-Gradient-4194k": "Llama-3-8B-Instruct-262k",
    }
)


def published_model(name: str) -> Target | None:
    """The published model whose name a text begins with: "Llama_3_8B_Instruct_262k_best.json", "models/Qwen3-32B". The
    longest such name counts."""
    given = spelled(name.rstrip("/").rsplit("/", 1)[-1])
    fitting = [model for model in PUBLISHED if given.startswith(spelled(model.name))]
    return max(fitting, key=lambda model: len(spelled(model.name)), default=None)
