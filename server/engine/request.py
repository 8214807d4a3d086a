"""What the API hands to the engine and what comes back: frozen values, with every limit in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIAS = 1024
MAX_STOP_LENGTH = 1024  # characters of one stop string


class RequestError(Exception):
    """A request that cannot be served as asked. The message is one sentence that says what to do."""


class InvalidRequest(RequestError):
    """The request itself is wrong: 400. `param` names the field, `code` is OpenAI's code where there is one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(RequestError):
    """The queue is full: 503 with Retry-After. `reason` labels the metric."""

    def __init__(self, message: str, *, reason: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class Unavailable(RequestError):
    """The server is starting, draining or dead: 503."""

    def __init__(self, message: str, *, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Temperature 0 is greedy. Raises InvalidRequest."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; 0: the sampled token's; k: the k most likely too

    def __post_init__(self) -> None:
        _range("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) must not be larger than max_tokens ({self.max_tokens}).",
                param="min_tokens",
            )
        _range("temperature", self.temperature, 0.0, 2.0)
        _range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _range("top_k", self.top_k, 0, 2**31 - 1)
        _range("min_p", self.min_p, 0.0, 1.0)
        _range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _most("stop", self.stop, MAX_STOP_STRINGS)
        _most("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        _most("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest(f"Every stop string must hold 1 to {MAX_STOP_LENGTH} characters.", param="stop")
        for _, bias in self.logit_bias:
            _range("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    def check_vocabulary(self, vocab_size: int) -> None:
        """Every token id named by the request must exist. Raises InvalidRequest."""
        for param, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", [i for i, _ in self.logit_bias])):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(
                        f"{param} names token {token}, but the vocabulary holds tokens 0 to {vocab_size - 1}.",
                        param=param,
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it, `n` times."""

    id: str  # ours, never the client's
    prompt: Sequence[int]  # token ids, at least one
    params: SamplingParams
    n: int = 1
    priority: int = 0  # lower first
    cache_salt: str = ""
    point: str | None = None  # operating point of the attention policy; None: the server's default
    prompt_logprobs: int | None = None  # as SamplingParams.logprobs, for the prompt's own tokens

    def __post_init__(self) -> None:
        _range("n", self.n, 1, MAX_CHOICES)
        _range("priority", self.priority, -(2**31), 2**31 - 1)
        if self.prompt_logprobs is not None:
            _range("logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if len(self.prompt) == 0:
            raise InvalidRequest("The prompt must hold at least one token.", param="prompt")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the model (temperature 1, no penalties, no biases), and of the likeliest."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), most likely first; the same floats as `logprob`


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The prompt has been computed. Sent once per request, before any Delta."""

    cached_tokens: int  # prompt tokens whose pages were reused
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one per prompt token; the first is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The prompt is being computed: for the heartbeat of a long prefill."""

    computed: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionUse:
    """What one choice's attention read and held. Numbers of pages are summed over queries, layers and heads."""

    point: str  # operating point
    prefill_read: float
    prefill_possible: float
    decode_read: float
    decode_possible: float
    kv_bytes: int  # in its pages at the end, shared ones included
    dense_because: Literal["policy", "short"] | None  # why nothing was left out, if nothing was


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step adds to one choice. `text` holds whole characters, with stop strings already cut off."""

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token when asked for
    finish_reason: FinishReason | None = None  # set on the last delta of a choice
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    message: str | None = None  # one sentence, with finish_reason "error"
    attention: AttentionUse | None = None  # with finish_reason, where attention was computed


Event = Started | Progress | Delta


def _range(param: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        bound = "above" if open_low else "at least"
        raise InvalidRequest(f"{param} must be {bound} {low} and at most {high}, not {value}.", param=param)


def _most(param: str, values: Sequence[object], most: int) -> None:
    if len(values) > most:
        raise InvalidRequest(f"{param} may hold at most {most} entries, not {len(values)}.", param=param)
