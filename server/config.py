"""Every knob of the server, once. Flags, the YAML file and the help texts are made from the fields of ServerConfig."""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from gossamer.attention.plain_yaml import load_plain_yaml

DEMO_MODEL = "gossamer-demo"

DType = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
KVCacheDType = Literal["auto", "fp8", "fp8_e4m3"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
GenerationDefaults = Literal["auto", "none"]
LogLevel = Literal["debug", "info", "warning", "error"]

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one sentence that names it and says what to do."""


def parse_bytes(text: str) -> int:
    """ "4GiB", "512 MB" or a plain number of bytes. Kibi units count in 1024, the others in 1000. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError("expected a size such as 4GiB, 512MB or 1000000")
    unit = found[2].lower()
    return int(float(found[1]) * (_BINARY if found[3] else _DECIMAL)[unit])


def parse_tokens(text: str) -> int:
    """ "128k" and "1m" count in 1024, as context lengths do; "8192" is itself. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError("expected a number of tokens such as 8192, 128k or 1m")
    return int(float(found[1]) * _BINARY.get(found[2].lower(), 1))


def _knob(
    group: str,
    help: str,
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: Callable[[str], int] | None = None,
    shown: str = "",
    secret: bool = False,
) -> Any:
    """A field with what the command line says about it. `shown` describes a default that is found at start."""
    return field(
        default=default,
        repr=not secret,
        metadata={"group": group, "help": help, "low": low, "high": high, "unit": unit, "shown": shown},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Complete and checked when made. Raises ConfigError."""

    model: str = _knob("Model", "Hugging Face directory or id; the packaged demo model when left out.", DEMO_MODEL)
    served_model_name: tuple[str, ...] = _knob(
        "Model", "Names that clients may use; answers carry the one asked for.", (), shown="MODEL"
    )
    revision: str | None = _knob("Model", "Branch, tag or commit of the model on the hub.", None)
    tokenizer: str | None = _knob("Model", "Directory or id of the tokenizer.", None, shown="MODEL")
    chat_template: str | None = _knob("Model", "File with a Jinja chat template.", None, shown="the tokenizer's")
    dtype: DType = _knob("Model", "Type of weights; auto: the checkpoint's where it is fast.", "auto")
    device: Device = _knob("Model", "Where the model runs; auto: a GPU where there is one.", "auto")
    load_format: LoadFormat = _knob("Model", "auto, safetensors: the weights; dummy: random ones, for tests.", "auto")
    fused_kernels: bool = _knob(
        "Model", "On a GPU, norms, activations and rotations are one kernel each where Liger-Kernel is installed.", True
    )
    generation_config: GenerationDefaults = _knob(
        "Model", "auto: sampling defaults from the model's generation_config.json; none: OpenAI's.", "auto"
    )
    seed: int = _knob("Model", "Where requests without a seed draw theirs from.", 0, low=0, high=2**63 - 1)

    attention_policy: str | None = _knob(
        "Attention", "Policy file or packaged name.", None, shown="the model's own, else dense"
    )
    attention_point: str | None = _knob(
        "Attention", "Operating point for requests that name none.", None, shown="the policy's default"
    )
    attention_allow_points: tuple[str, ...] = _knob(
        "Attention", "Operating points that requests may name.", (), shown="all of the policy's"
    )

    quality_sample_rate: float = _knob(
        "Quality",
        "Share of the steps that generate tokens, and of the tiles of prompts, in which a few sparse heads look at "
        "every key once more, for the metrics; 0: none.",
        0.0025,
        low=0.0,
        high=1.0,
    )
    quality_min_recall: float | None = _knob(
        "Quality", "Raise an operating point's alarm when its checks find less recall than this in the mean.", None,
        low=0.0, high=1.0, shown="no alarm",
    )  # fmt: skip
    quality_max_error: float | None = _knob(
        "Quality", "Raise an operating point's alarm when its checks find a larger output error in the mean.", None,
        low=0.0, shown="no alarm",
    )  # fmt: skip
    quality_fall_back: bool = _knob(
        "Quality", "Give new requests the next safer operating point for ten minutes after an alarm.", False
    )

    max_model_len: int | None = _knob(
        "Memory and batching", "Longest prompt and answer together, in tokens.", None, low=1, unit=parse_tokens,
        shown="the model's",
    )  # fmt: skip
    kv_cache_memory: int | None = _knob(
        "Memory and batching", "Memory for keys and values.", None, low=1, unit=parse_bytes, shown="what is free"
    )
    kv_cache_dtype: KVCacheDType = _knob(
        "Memory and batching",
        "Type of keys and values in the cache. auto: --dtype; fp8 (or fp8_e4m3): float8_e4m3fn with a scale per "
        "token and KV head, half the memory of bfloat16.",
        "auto",
    )
    gpu_memory_utilization: float = _knob(
        "Memory and batching", "Share of the GPU's memory to use when --kv-cache-memory is not given.", 0.9,
        low=0.05, high=1.0,
    )  # fmt: skip
    max_num_seqs: int = _knob("Memory and batching", "Most sequences in one step.", 64, low=1, high=4096)
    max_num_batched_tokens: int | None = _knob(
        "Memory and batching",
        "Most tokens in one step.",
        None,
        low=1,
        unit=parse_tokens,
        shown="2048 on CPU, 8192 on GPU",
    )
    max_step_seconds: float = _knob(
        "Memory and batching", "Longest step, in seconds, while others wait for it: long prompts are cut finer.", 0.5,
        low=0.001,
    )  # fmt: skip
    cuda_graphs: bool = _knob(
        "Memory and batching", "On a GPU, record decode steps at start, so that one call launches each.", True
    )
    async_scheduling: bool = _knob(
        "Memory and batching", "On a GPU, plan and launch each step while the one before it runs.", True
    )
    enable_prefix_caching: bool = _knob("Memory and batching", "Reuse the keys and values of equal beginnings.", True)
    threads: int | None = _knob("Memory and batching", "CPU threads of the model.", None, low=1, shown="torch's choice")

    max_queued_requests: int | None = _knob(
        "Queue", "Most choices that wait; more are answered 503.", None, low=1, shown="4 × --max-num-seqs"
    )
    max_queued_tokens: int | None = _knob(
        "Queue", "Most prompt tokens that wait; more are answered 503.", None, low=1, unit=parse_tokens,
        shown="4 × KV capacity",
    )  # fmt: skip
    queue_timeout: float = _knob("Queue", "Longest wait in the queue, in seconds.", 300.0, low=0.001)

    host: str = _knob("HTTP", "Address to listen on.", "127.0.0.1")
    port: int = _knob("HTTP", "Port to listen on; 0 picks a free one.", 8000, low=0, high=65535)
    root_path: str = _knob("HTTP", "Path below which a proxy in front shows this server (it strips the path).", "")
    allowed_origins: tuple[str, ...] = _knob(
        "HTTP", "Web origins that may call from a browser (CORS).", (), shown="none"
    )
    max_body_size: int | None = _knob(
        "HTTP", "Largest request body.", None, low=1024, unit=parse_bytes, shown="4 MiB + 16 bytes × --max-model-len"
    )
    read_timeout: float = _knob(
        "HTTP", "Seconds a client has to send its headers, or the next 64 KiB of a body.", 30.0, low=0.1
    )
    write_timeout: float = _knob("HTTP", "Seconds after which a client that reads nothing is dropped.", 60.0, low=0.1)
    sse_keep_alive_interval: float = _knob(
        "HTTP", "Seconds between comments in a silent stream; 0: none.", 15.0, low=0.0
    )
    shutdown_timeout: float = _knob("HTTP", "Seconds that open requests have to finish after SIGTERM.", 30.0, low=0.0)
    disable_fastapi_docs: bool = _knob("HTTP", "Serve no /docs and no /openapi.json.", False)

    api_key: tuple[str, ...] = _knob(
        "Access", "Key that clients must send; may be repeated.", (), shown="none", secret=True
    )
    api_key_file: str | None = _knob("Access", "File with one key per line.", None)
    open_metrics: bool = _knob("Access", "Let /metrics be read without a key.", False)

    log_level: LogLevel = _knob("Logs", "Least severe message to print.", "info")
    access_log: bool = _knob("Logs", "Print a line per HTTP request.", False)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            low, high = spec.metadata["low"], spec.metadata["high"]
            choices = typing.get_args(spec.type) if typing.get_origin(spec.type) is Literal else ()
            flag = flag_of(spec.name)
            if choices and value not in choices:
                raise ConfigError(f"{flag} must be one of {', '.join(choices)}, not {value!r}.")
            if low is not None and value is not None and not low <= value:
                raise ConfigError(f"{flag} must be at least {low}, not {value}.")
            if high is not None and value is not None and not value <= high:
                raise ConfigError(f"{flag} must be at most {high}, not {value}.")
        if not self.model:
            raise ConfigError("--model must not be empty.")
        bounded = self.quality_min_recall is not None or self.quality_max_error is not None
        if self.quality_fall_back and not bounded:
            raise ConfigError("--quality-fall-back needs a bound: give --quality-min-recall or --quality-max-error.")
        if bounded and self.quality_sample_rate == 0:
            raise ConfigError("Bounds of quality need checks: give a --quality-sample-rate above 0.")
        if any(not name or len(name) > 256 for name in self.served_model_name):
            raise ConfigError("--served-model-name must hold 1 to 256 characters.")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError("--root-path must start with a slash and end without one.")
        if any(not key or not key.isprintable() or not key.isascii() for key in self.api_key):
            raise ConfigError("--api-key must hold printable ASCII characters.")

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which clients find the model; the first is shown."""
        return self.served_model_name or (self.model,)

    @property
    def model_path(self) -> str:
        """What to load: the packaged demo model's directory, or `model` as given."""
        return str(files("gossamer") / "configs" / "models" / DEMO_MODEL) if self.model == DEMO_MODEL else self.model

    @property
    def fp8_cache(self) -> bool:
        """Whether keys and values are kept in FP8."""
        return self.kv_cache_dtype != "auto"

    @property
    def queued_requests(self) -> int:
        return self.max_queued_requests or 4 * self.max_num_seqs

    def keys(self) -> tuple[str, ...]:
        """Every API key, from the flag and the file. Empty: no key is needed. Raises ConfigError."""
        if self.api_key_file is None:
            return self.api_key
        try:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {self.api_key_file} cannot be read: {_reason(error)}.") from None
        keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
        if not keys:
            raise ConfigError(f"--api-key-file {self.api_key_file} holds no key.")
        if any(not key.isprintable() or not key.isascii() for key in keys):
            raise ConfigError(f"--api-key-file {self.api_key_file} must hold printable ASCII characters only.")
        return (*self.api_key, *keys)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(spec: "dataclasses.Field[Any]") -> type:
    """bool, int, float, str or tuple: what a field holds, apart from None."""
    if typing.get_origin(spec.type) is Literal:
        return str
    if isinstance(spec.type, types.UnionType):
        return next(kind for kind in typing.get_args(spec.type) if kind is not types.NoneType)  # type: ignore[no-any-return]
    return typing.get_origin(spec.type) or typing.cast(type, spec.type)


def default_text(spec: "dataclasses.Field[Any]") -> str:
    """The default as the help shows it; empty when there is none."""
    if spec.metadata["shown"]:
        return str(spec.metadata["shown"])
    return "" if spec.default in (None, (), "") or isinstance(spec.default, bool) else f"{spec.default}"


def read_value(spec: "dataclasses.Field[Any]", value: object) -> Any:
    """A value from a flag (text) or from YAML (typed), as the field's type. Raises ConfigError."""
    kind, unit = kind_of(spec), spec.metadata["unit"]
    try:
        if value is None and spec.default is None:
            return None
        if kind is tuple:
            items = [value] if isinstance(value, str) else value
            if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
                raise ValueError("expected a list of texts")
            return tuple(items)
        if kind is bool or isinstance(value, bool):
            if kind is bool and isinstance(value, bool):
                return value
            raise ValueError("expected true or false" if kind is bool else f"expected {_expected(kind)}")
        if isinstance(value, str) and kind in (int, float):
            return (unit or kind)(value)
        if kind is float and isinstance(value, int | float):
            return float(value)
        if isinstance(value, kind):
            return value
        raise ValueError(f"expected {_expected(kind)}")
    except ValueError as error:
        reason = str(error) if str(error).startswith("expected") else f"expected {_expected(kind)}"
        raise ConfigError(f"{flag_of(spec.name)}: {reason}, not {str(value)[:80]!r}.") from None


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file: one mapping from names, with - or _, to values. Raises ConfigError."""
    try:
        loaded = load_plain_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {_reason(error)}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = f" (line {mark.line + 1})" if mark is not None else f": {error}" if type(error) is yaml.YAMLError else ""
        raise ConfigError(f"--config {path} is not valid YAML{why}.") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise ConfigError(f"--config {path} must hold a mapping from setting names to values.")
    return {name.replace("-", "_"): value for name, value in loaded.items()}


def make_config(flags: Mapping[str, object], config_file: Path | None = None) -> ServerConfig:
    """Flags win over the file, the file over the defaults; a flag that is None was not given. Raises ConfigError."""
    specs = {spec.name: spec for spec in dataclasses.fields(ServerConfig)}
    given = read_config_file(config_file) if config_file is not None else {}
    for name in given:
        if name not in specs:
            near = _nearest(name, specs)
            hint = f"; did you mean {near}?" if near else "."
            raise ConfigError(f"--config {config_file} sets {name!r}, which is not a setting{hint}")
    given |= {name: value for name, value in flags.items() if value is not None}
    return ServerConfig(**{name: read_value(specs[name], value) for name, value in given.items()})


def _nearest(name: str, names: Mapping[str, object]) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(name, names, n=1)), "")


def _expected(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")


def _reason(error: Exception) -> str:
    return (error.strerror or "it cannot be opened").lower() if isinstance(error, OSError) else "it is not UTF-8 text"
