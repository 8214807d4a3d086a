"""POST /v1/completions: all four forms of `prompt`, and `echo` with log-probabilities."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from gossamer.server.api.answer import answer
from gossamer.server.api.body import parse_object
from gossamer.server.api.job import Job, check_text, make_job
from gossamer.server.api.logprobs import CompletionLogprobs
from gossamer.server.api.schemas import CompletionRequest, body_schema, read_fields, read_tokens
from gossamer.server.api.service import Service
from gossamer.server.engine.request import Delta, InvalidRequest, Started

DEFAULT_TOKENS = 16


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(http: HTTPRequest) -> Response:
        return await answer(service, http, prepare, CompletionForm)

    return router


def prepare(service: Service, raw: bytes, header: str | None) -> Job:
    """`header`: X-Gossamer-Policy. Any thread. Raises InvalidRequest or HTTPError."""
    fields = read_fields(CompletionRequest, parse_object(raw))
    service.model_named(fields.model)
    if fields.max_tokens == 0 and not fields.echo:
        raise InvalidRequest("max_tokens must be at least 1, unless echo is true.", param="max_tokens")
    prompts = read_prompts(service, fields)
    echo = None
    if fields.echo:
        coder, skip = service.engine.tokenizer, fields.skip_special_tokens
        echo = tuple(
            prompt if isinstance(prompt, str) else coder.decode(prompt, skip_special_tokens=skip)
            for prompt, _ in prompts
        )
    return make_job(
        service,
        fields,
        header,
        "cmpl-",
        [tokens for _, tokens in prompts],
        max_tokens=fields.max_tokens,
        default_tokens=DEFAULT_TOKENS,
        prompt_field="prompt",
        logprobs=fields.logprobs,
        echo=echo,
        prompt_logprobs=fields.logprobs if fields.echo else None,
    )


def read_prompts(service: Service, fields: CompletionRequest) -> list[tuple[str | list[int], list[int]]]:
    """Each prompt as it was given, and its tokens. Raises InvalidRequest."""
    coder, model = service.engine.tokenizer, service.engine.model
    given = fields.prompt
    if not isinstance(given, str | list) or not given:
        raise InvalidRequest("prompt must be a text, a list of texts, or token ids, and not empty.", param="prompt")
    if isinstance(given, str) or (type(given[0]) is not str and not isinstance(given[0], list)):
        given = [given]
    if len(given) > service.config.queued_requests:
        raise InvalidRequest(
            f"A request may hold at most {service.config.queued_requests} prompts, not {len(given)}.", param="prompt"
        )
    prompts: list[tuple[str | list[int], list[int]]] = []
    for prompt in given:
        if isinstance(prompt, str) and prompt and isinstance(given[0], str):
            check_text(prompt, model.max_model_len, "prompt")
            prompts.append((prompt, coder.encode(prompt, add_special_tokens=fields.add_special_tokens)))
        elif isinstance(prompt, list) and prompt and isinstance(given[0], list):
            prompts.append((prompt, read_tokens(prompt, "prompt", model.vocab_size)))
        elif prompt in ("", []):
            raise InvalidRequest("A prompt must not be empty.", param="prompt")
        else:
            raise InvalidRequest("prompt must hold either texts only or token ids only.", param="prompt")
    return prompts


class CompletionForm:
    whole = piece = "text_completion"

    def __init__(self, service: Service, job: Job) -> None:
        self._job = job
        skips = job.requests[0].params.skip_special_tokens
        self._logprobs = [CompletionLogprobs(service.engine.tokenizer, skips) for _ in range(job.choices)]

    def begin(self, first: int, source: int, started: Started) -> list[dict[str, Any]]:
        if self._job.echo is None and not self._job.return_token_ids:
            return []
        chunks = []
        for number in range(first, first + self._job.requests[source].n):
            text, logprobs, extra = self._prompt(number, source, started)
            chunks.append({"index": number, "text": text, "logprobs": logprobs, "finish_reason": None, **extra})
        return chunks

    def step(self, number: int, delta: Delta) -> list[dict[str, Any]]:
        logprobs = self._answer(number, [delta])
        if not delta.text and delta.finish_reason is None and logprobs is None and not self._job.return_token_ids:
            return []
        chunk = {"index": number, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            chunk["stop_reason"] = delta.stop_reason
        if self._job.return_token_ids:
            chunk["token_ids"] = list(delta.tokens)
        return [chunk]

    def complete(self, number: int, source: int, started: Started, deltas: list[Delta]) -> dict[str, Any]:
        prompt, before, extra = self._prompt(number, source, started)
        after = self._answer(number, deltas)
        logprobs = after if before is None else before if after is None else {k: before[k] + after[k] for k in before}
        choice = {
            "index": number,
            "text": prompt + "".join(delta.text for delta in deltas),
            "logprobs": logprobs,
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
            **extra,
        }
        if self._job.return_token_ids:
            choice["token_ids"] = [token for delta in deltas for token in delta.tokens]
        return choice

    def _prompt(self, number: int, source: int, started: Started) -> tuple[str, dict[str, Any] | None, dict[str, Any]]:
        """The echoed text, its log-probabilities and the prompt's ids, as far as they were asked for."""
        prompt = list(self._job.requests[source].prompt)
        extra = {"prompt_token_ids": prompt} if self._job.return_token_ids else {}
        if self._job.echo is None:
            return "", None, extra
        logprobs = None
        if self._job.logprobs is not None and started.prompt_logprobs is not None:
            logprobs = self._logprobs[number].part(prompt, started.prompt_logprobs, self._job.logprobs)
        return self._job.echo[source], logprobs, extra

    def _answer(self, number: int, deltas: list[Delta]) -> dict[str, Any] | None:
        items = [item for delta in deltas for item in delta.logprobs]
        if self._job.logprobs is None or not items:
            return None
        return self._logprobs[number].part([item.token for item in items], items, self._job.logprobs)
