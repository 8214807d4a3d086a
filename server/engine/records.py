"""What the engine tells the metrics: one record per step, per finished choice, and a snapshot of the state."""

from collections.abc import Mapping
from dataclasses import dataclass

from gossamer.server.engine.request import AttentionUse, FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One forward pass. What it computed for choices that had ended before it did is not counted."""

    prompt_tokens: int  # computed in this step
    generated_tokens: int
    sequences: int
    seconds: float  # since the step before it was complete, or since its launch when the engine had nothing to do
    model_seconds: float  # of the model's forward, attention included; on a GPU, until it is launched
    select_seconds: float  # of these, for choosing keys; 0 on a GPU
    attend_seconds: float  # of these, for attention itself; 0 on a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """A choice produced its first token."""

    seconds: float  # since arrival


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A choice has ended. Times in seconds on the monotonic clock; those of phases never reached are 0."""

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    max_tokens: int
    n: int
    preemptions: int
    end_to_end: float
    queued: float  # arrival to first admission
    prefill: float  # first admission to first token
    decode: float  # first token to last
    point: str  # operating point
    attention: AttentionUse


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleStats:
    """One pool of pages: the heads that share a retention rule."""

    rule: str  # for example "all", "sink64+recent256"
    pages: int
    pages_owned: int  # by running sequences
    pages_cached: int  # kept only for prefix reuse
    bytes_per_page: int

    @property
    def bytes_owned(self) -> int:
        return self.pages_owned * self.bytes_per_page


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot, cheap enough to take at every scrape."""

    running: int
    waiting: int
    pending_prefill_tokens: int
    kv_usage: float  # 0 to 1, the fullest pool
    kv_token_capacity: int
    kv_dtype: str  # of keys and values as stored: "bfloat16", "float8_e4m3fn"
    prefix_queried_tokens: int  # since start
    prefix_hit_tokens: int
    preemptions: int
    rules: tuple[RuleStats, ...]
    heartbeat_age: float  # seconds since the engine's loop last turned; 0 when idle
    alarms: Mapping[str, bool]  # by operating point, whether live checks have crossed the bounds of quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """`alive`: the engine can still make progress. `ready`: it takes new requests."""

    alive: bool
    ready: bool
    reason: str = ""
