"""From checked fields to what the engine is asked for, the same way for chat and completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gossamer.server.api.errors import HTTPError
from gossamer.server.api.schemas import Sampling
from gossamer.server.api.service import Service
from gossamer.server.engine.request import MAX_CHOICES, InvalidRequest, Request, SamplingParams

POLICY_HEADER = "X-Gossamer-Policy"
MAX_CHARACTERS_PER_TOKEN = 16  # a text with more than this many per token of context is refused before it is tokenised


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request, ready to be submitted and answered."""

    id: str
    created: int  # unix seconds
    model: str  # as the client named it
    fingerprint: str
    requests: tuple[Request, ...]  # one per prompt
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    logprobs: int | None  # as SamplingParams.logprobs
    echo: tuple[str, ...] | None = None  # the prompts' texts, to be sent before the answers

    @property
    def choices(self) -> int:
        return sum(request.n for request in self.requests)


def make_job(
    service: Service,
    fields: Sampling,
    header: str | None,
    prefix: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | None,
    default_tokens: int | None,
    prompt_field: str,
    logprobs: int | None,
    echo: tuple[str, ...] | None = None,
    prompt_logprobs: int | None = None,
) -> Job:
    """`header`: X-Gossamer-Policy. `default_tokens` None: the rest of the context. Errors about the prompt name
    `prompt_field`.

    Any thread. Raises InvalidRequest, HTTPError 403 or 404.
    """
    if fields.best_of is not None and fields.best_of != fields.n:
        raise InvalidRequest("best_of must equal n; this server returns every choice it makes.", param="best_of")
    most = min(MAX_CHOICES, service.config.queued_requests)
    if fields.n > most:
        raise InvalidRequest(f"n must be at most {most}, not {fields.n}.", param="n")
    if fields.n * len(prompts) > service.config.queued_requests:
        raise InvalidRequest(
            f"A request may ask for at most {service.config.queued_requests} choices, not {fields.n * len(prompts)}; "
            "send the prompts in several requests.",
            param="prompt" if fields.n < 2 else "n",
        )
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
    point = _point(service, fields, header)
    salt = fields.cache_salt or ""
    if not salt.isprintable():
        raise InvalidRequest("cache_salt must hold printable characters.", param="cache_salt")
    options = fields.stream_options
    model = service.model_named(fields.model)
    job_id = prefix + uuid.uuid4().hex
    params = _params(service, fields, logprobs)
    params.check_vocabulary(service.engine.model.vocab_size)
    limit = service.engine.model.max_model_len
    requests = tuple(
        Request(
            id=f"{job_id}-{number}",
            prompt=prompt,
            params=replace(
                params, max_tokens=answer_length(len(prompt), max_tokens, default_tokens, limit, prompt_field)
            ),
            n=fields.n,
            priority=fields.priority,
            cache_salt=salt,
            point=point,
            prompt_logprobs=prompt_logprobs,
        )
        for number, prompt in enumerate(prompts)
    )
    return Job(
        id=job_id,
        created=int(time.time()),
        model=model,
        fingerprint=service.engine.fingerprint_of(point),
        requests=requests,
        stream=fields.stream,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        return_token_ids=fields.return_token_ids,
        logprobs=logprobs,
        echo=echo,
    )


def _point(service: Service, fields: Sampling, header: str | None) -> str | None:
    """The operating point that the request asks for, in its body or in the header."""
    asked = None if fields.attention is None else fields.attention.policy
    if asked is not None and header is not None and asked != header:
        raise InvalidRequest(
            f"attention.policy and the header {POLICY_HEADER} differ; send one of them.", param="attention.policy"
        )
    point, allowed = asked or header, service.engine.points
    if point is None or point in allowed:
        return point
    names = ", ".join(allowed)
    if point in service.engine.all_points:
        raise HTTPError(
            403,
            f"This server does not let requests choose the attention policy {point!r}; allowed: {names}.",
            param="attention.policy",
            code="forbidden_policy",
        )
    raise InvalidRequest(
        f"There is no such attention policy here; choose one of: {names}.",
        param="attention.policy",
        code="unknown_policy",
    )


def answer_length(prompt: int, asked: int | None, default: int | None, limit: int, prompt_field: str) -> int:
    """How many tokens the answer may have. Raises InvalidRequest when prompt and answer outgrow the context."""
    if asked is not None and not 0 <= asked < 2**31:
        raise InvalidRequest(f"max_tokens must be between 1 and {limit}, not {asked}.", param="max_tokens")
    if prompt + (1 if asked is None else asked) > limit:
        answer = "" if asked is None else f" and {asked} were asked for in the answer"
        raise InvalidRequest(
            f"This server's context holds {limit} tokens, but the prompt has {prompt}{answer}; shorten one of them.",
            param=prompt_field if asked is None or prompt >= limit else "max_tokens",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return limit - prompt if default is None else min(default, limit - prompt)


def check_text(text: str, limit: int, param: str) -> None:
    """Refuse what is certainly too long before it is tokenised. Raises InvalidRequest."""
    if len(text) > MAX_CHARACTERS_PER_TOKEN * limit:
        raise InvalidRequest(
            f"This server's context holds {limit} tokens; a text of {len(text)} characters cannot fit.",
            param=param,
            code="context_length_exceeded",
        )


def _params(service: Service, fields: Sampling, logprobs: int | None) -> SamplingParams:
    """All but max_tokens, which depends on the prompt."""
    defaults = service.engine.model.default_sampling

    def value(name: str, given: float | None, neutral: float) -> float:
        return given if given is not None else defaults.get(name, neutral)

    top_k = int(value("top_k", fields.top_k, 0))
    biases = []
    for key, bias in fields.logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest("logit_bias must map token ids to numbers.", param="logit_bias")
        if key != str(int(key)):
            raise InvalidRequest(
                f"logit_bias names token {int(key)} as {key!r}; leave out the zeros.", param="logit_bias"
            )
        biases.append((int(key), bias))
    return SamplingParams(
        max_tokens=2**31 - 1,
        min_tokens=fields.min_tokens,
        temperature=value("temperature", fields.temperature, 1.0),
        top_p=value("top_p", fields.top_p, 1.0),
        top_k=0 if top_k == -1 else top_k,
        min_p=value("min_p", fields.min_p, 0.0),
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=value("repetition_penalty", fields.repetition_penalty, 1.0),
        seed=fields.seed,
        stop=tuple(fields.stop),
        stop_token_ids=tuple(fields.stop_token_ids),
        ignore_eos=fields.ignore_eos,
        include_stop_str_in_output=fields.include_stop_str_in_output,
        skip_special_tokens=fields.skip_special_tokens,
        logit_bias=tuple(biases),
        logprobs=logprobs,
    )
