"""The model: transformers loads it, `attend` is plugged in, and a step's tokens become logits."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from gossamer.attention.attend import attend
from gossamer.attention.step import Step
from gossamer.server.engine.families import StartupError, check_family
from gossamer.server.engine.fused import fuse

ATTENTION = "gossamer"  # the name that our attention function has inside transformers
PROBE = "gossamer-probe"
LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the engine has to know of a model, as its own layers report it."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # per layer: the sliding window that the model itself has
    vocab_size: int
    max_positions: int
    parameters: int
    activation_width: int  # elements per token of the widest activation

    @property
    def ratio(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def attention_crossover(self) -> float:
        """Tokens of context at which attending costs as many multiplications as the weights do."""
        return self.parameters / (2 * self.layers * self.query_heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model on one device. Not thread-safe: the engine thread alone runs it."""

    module: nn.Module
    shape: ModelShape
    family: str
    dtype: torch.dtype
    device: torch.device
    eos_ids: tuple[int, ...]
    default_sampling: Mapping[str, float]  # temperature, top_p, ... of generation_config.json

    def forward(self, tokens: Tensor, positions: Tensor, step: Step, rows: Tensor) -> Tensor:
        """tokens and positions [T] int64, all sequences of the step end to end; rows [R] int64 -> logits [R, V]."""
        with torch.inference_mode():
            output = self.module(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=rows,
                step=step,
            )
        logits: Tensor = output.logits[0]
        return logits


def load_model(
    path: str,
    *,
    revision: str | None,
    dtype: str,
    device: torch.device,
    served_length: int | None,
    dummy: bool = False,
    fused: bool = True,
    report: Callable[[str], None],
) -> Model:
    """Load `path`, a directory or a hub id, from safetensors alone. Raises StartupError.

    `served_length` is the longest sequence that will be served (None: all that the model can): RoPE variants that
    choose their factors by length are fixed to it, so that one long request cannot change its neighbours' keys.
    `dummy` takes random weights for the config instead of reading any. `fused`: on a GPU, with fused norms and
    activations where there are some.
    """
    config = load_config(path, revision)
    chosen = _dtype(dtype, config, device)
    report(f"Loading {path} ({config.model_type}, {str(chosen).removeprefix('torch.')}, {device})")
    AttentionInterface.register(ATTENTION, attend)
    AttentionInterface.register(PROBE, _record)
    module = _random_weights(config, chosen, device) if dummy else _load_weights(path, revision, config, chosen, device)
    longest = int(getattr(config, "max_position_embeddings", 0)) or 2**20
    _fix_rope(module, min(served_length or longest, longest), device)
    shape = _probe(module, config, longest, device)
    module.set_attn_implementation(ATTENTION)
    if fused and device.type == "cuda" and fuse(module, config.model_type):
        report("Norms and activations are fused (Liger-Kernel)")
    eos_ids, sampling = _generation_defaults(path, revision, config)
    return Model(module, shape, config.model_type, chosen, device, eos_ids, sampling)


def load_config(path: str, revision: str | None) -> PreTrainedConfig:
    """The model's config.json, checked for a family that can be served. Raises StartupError."""
    local = Path(path)
    if local.is_dir():
        file = local / "config.json"
        if not file.is_file():
            raise StartupError(f"{path} holds no config.json; give the directory of a Hugging Face checkpoint.")
        try:
            raw = json.loads(file.read_text("utf-8"))
        except (ValueError, OSError) as error:
            raise StartupError(f"{file} cannot be read as JSON ({error}); copy the checkpoint again.") from error
        if not isinstance(raw, dict):
            raise StartupError(f"{file} holds no JSON object; copy the checkpoint again.")
        check_family(raw)
    elif local.exists() or path.startswith((".", "/", "~")):
        raise StartupError(f"{path} is not a directory; give the directory of a Hugging Face checkpoint or a hub id.")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:
        if local.is_dir():
            sentence = f"{local / 'config.json'} has a wrong entry ({_first_line(error)}); copy the checkpoint again."
        else:
            sentence = (
                f"The configuration of {path} cannot be loaded ({_first_line(error)}); check the name of the model, "
                "--revision, and the network."
            )
        raise StartupError(sentence) from error
    assert isinstance(config, PreTrainedConfig)
    check_family(config.to_dict())
    return config


def _load_weights(
    path: str, revision: str | None, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> Any:
    """The module in evaluation mode; refuses pickled, truncated and incomplete checkpoints by name."""
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise StartupError(
            f"{path} holds no .safetensors file; only safetensors weights are loaded, convert the checkpoint."
        )
    quiet = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            config=config,
            dtype=dtype,
            attn_implementation=PROBE,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": device},  # straight to where they are used: host memory need not hold them all
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below; transformers prints a table and raises without names
        )
    except Exception as error:
        raise StartupError(
            f"The weights of {path} cannot be loaded ({_first_line(error)}); copy the checkpoint again."
        ) from error
    finally:
        transformers_logging.set_verbosity(quiet)
    module, info = loaded
    layers = config.get_text_config().num_hidden_layers
    if beyond := [
        int(n) for key in info.get("unexpected_keys", ()) for n in LAYER.findall(str(key)) if int(n) >= layers
    ]:
        raise StartupError(
            f"The checkpoint {path} has weights of layer {max(beyond)}, but its config.json names {layers} layers; "
            "its weights do not belong to its config.json."
        )
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for")):
        if info.get(kind):
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind])
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise StartupError(f"The checkpoint {path} {what} {some}; its weights do not belong to its config.json.")
    return module.eval()


def _random_weights(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The module as its family initialises it, the same at every start."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        make: Any = AutoModelForCausalLM.from_config
        return make(config, dtype=dtype, attn_implementation=PROBE).eval()


def _dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in; `auto`: the checkpoint's, but on a CPU bf16 only where it is fast, and fp16 never."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    own = getattr(config, "dtype", None)
    own = own if isinstance(own, torch.dtype) else torch.float32
    if device.type != "cpu" or own not in (torch.bfloat16, torch.float16):
        return own
    return torch.bfloat16 if has_fast_bf16() else torch.float32


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices natively."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _fix_rope(module: nn.Module, served_length: int, device: torch.device) -> None:
    """Let every rotary embedding choose its factors for `served_length` once, and never again."""
    for rotary in module.modules():
        kind = getattr(rotary, "rope_type", None)
        kinds: Mapping[str | None, str] = (
            kind if isinstance(kind, dict) else {None: kind} if isinstance(kind, str) else {}
        )
        last = torch.tensor([[served_length - 1]], device=device)
        fixed = dict(kinds)
        for layer_type, name in kinds.items():
            if "dynamic" in name or name == "longrope":
                extra = {} if layer_type is None else {"layer_type": layer_type}
                with torch.inference_mode():
                    rotary(torch.zeros(1, device=device), last, **extra)
                fixed[layer_type] = "default"  # what the forward pass looks at to decide whether to update
        if fixed != dict(kinds):
            rotary.rope_type = fixed if isinstance(kind, dict) else fixed[None]  # type: ignore[assignment]


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    seen: dict[int, Any],
    **kw: Any,
) -> tuple[Tensor, None]:
    """An attention function that notes how it was called."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    seen[layer] = (query.shape[1], key.shape[1], query.shape[3], value.shape[3], kw.get("sliding_window"))
    return torch.zeros_like(query).transpose(1, 2), None


def _probe(module: Any, config: PreTrainedConfig, longest: int, device: torch.device) -> ModelShape:
    """One forward pass of one token tells the heads and the window of each layer better than any config."""
    seen: dict[int, tuple[int, int, int, int, int | None]] = {}
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.inference_mode():
        logits = module(input_ids=zero, position_ids=zero, use_cache=False, seen=seen).logits
    layers = int(config.num_hidden_layers)
    shapes = {entry[:4] for entry in seen.values()}
    if sorted(seen) != list(range(layers)) or len(shapes) != 1:
        raise StartupError(f"This {config.model_type} model's layers differ in their heads, which cannot be served.")
    query_heads, kv_heads, head_dim, value_dim = shapes.pop()
    if head_dim != value_dim:
        raise StartupError(
            f"This {config.model_type} model's values are not as wide as its keys, which cannot be served."
        )
    parameters = sum(p.numel() for p in module.parameters())
    width = max(int(getattr(config, "intermediate_size", 0)), query_heads * head_dim, int(config.hidden_size))
    windows = tuple(seen[i][4] for i in range(layers))
    return ModelShape(layers, query_heads, kv_heads, head_dim, windows, logits.shape[-1], longest, parameters, width)


def _generation_defaults(
    path: str, revision: str | None, config: PreTrainedConfig
) -> tuple[tuple[int, ...], Mapping[str, float]]:
    """End-of-sequence ids and sampling defaults, from generation_config.json where there is one."""
    try:
        generation = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except Exception as error:
        file = Path(path) / "generation_config.json"
        if file.exists() or not isinstance(error, OSError):
            raise StartupError(f"{file} cannot be used ({_first_line(error)}); copy it again, or remove it.") from error
        generation = GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id if generation.eos_token_id is not None else getattr(config, "eos_token_id", None)
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(int(i) for i in eos)
    given = generation.to_diff_dict()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("do_sample") is False:
        sampling["temperature"] = 0.0
    return ids, MappingProxyType(sampling)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300].rstrip('.')}" if text else type(error).__name__
