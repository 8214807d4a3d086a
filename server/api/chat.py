"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from gossamer.server.api.answer import answer
from gossamer.server.api.body import parse_object
from gossamer.server.api.job import Job, check_text, make_job
from gossamer.server.api.logprobs import chat_logprobs
from gossamer.server.api.schemas import ChatRequest, ChatTemplateFields, body_schema, read_fields
from gossamer.server.api.service import Service
from gossamer.server.engine.request import MAX_LOGPROBS, Delta, InvalidRequest, Started

TEMPLATE_OPTIONS = frozenset({"enable_thinking", "thinking", "thinking_budget", "reasoning_effort", "date_string"})


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat_completions(http: HTTPRequest) -> Response:
        return await answer(service, http, prepare, ChatForm)

    return router


def prepare(service: Service, raw: bytes, header: str | None) -> Job:
    """`header`: X-Gossamer-Policy. Any thread. Raises InvalidRequest or HTTPError."""
    fields = read_fields(ChatRequest, parse_object(raw))
    service.model_named(fields.model)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    asked = fields.max_completion_tokens
    if asked is None:
        asked = fields.max_tokens
    elif fields.max_tokens not in (None, asked):
        raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them.", param="max_tokens")
    if asked == 0:
        name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        raise InvalidRequest(f"{name} must be at least 1, not 0.", param=name)
    if fields.top_logprobs is not None and not 0 <= fields.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs must be at least 0 and at most {MAX_LOGPROBS}, not {fields.top_logprobs}.",
            param="top_logprobs",
        )
    options = dict(fields.chat_template_kwargs)
    if fields.reasoning_effort is not None:
        options["reasoning_effort"] = fields.reasoning_effort
    prompt = encode_messages(service, fields, options)
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    return make_job(
        service,
        fields,
        header,
        "chatcmpl-",
        [prompt],
        max_tokens=asked,
        default_tokens=None,
        prompt_field="messages",
        logprobs=logprobs,
    )


def encode_messages(service: Service, fields: ChatTemplateFields, options: dict[str, Any]) -> list[int]:
    """The prompt's tokens. Any thread. Raises InvalidRequest."""
    coder, limit = service.engine.tokenizer, service.engine.model.max_model_len
    if not coder.has_chat_template:
        raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
    if fields.continue_final_message:
        if fields.add_generation_prompt:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other.", param="continue_final_message"
            )
        if fields.messages[-1].role != "assistant":
            raise InvalidRequest("continue_final_message needs an assistant message at the end.", param="messages")
    template = str(coder.info().get("chat_template") or "")
    for name in options:
        if name not in TEMPLATE_OPTIONS or name not in template:
            param = "reasoning_effort" if name == "reasoning_effort" else "chat_template_kwargs"
            raise InvalidRequest(f"This model's chat template takes no option {name[:64]!r}.", param=param)
    # "developer" is OpenAI's newer word for "system"; templates that do not know it would drop or refuse the message.
    developer = "developer" if "developer" in template else "system"
    messages = []
    for message in fields.messages:
        entry = {"role": developer if message.role == "developer" else message.role, "content": message.content}
        if message.name is not None:
            entry["name"] = message.name
        messages.append(entry)
    check_text("".join(message["content"] for message in messages), limit, "messages")
    add_prompt = (
        not fields.continue_final_message if fields.add_generation_prompt is None else fields.add_generation_prompt
    )
    return coder.encode_chat(
        messages,
        add_generation_prompt=add_prompt,
        continue_final_message=fields.continue_final_message,
        template_kwargs=options,
    )


class ChatForm:
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def __init__(self, service: Service, job: Job) -> None:
        self._coder = service.engine.tokenizer
        self._job = job

    def begin(self, first: int, source: int, started: Started) -> list[dict[str, Any]]:
        request = self._job.requests[source]
        extra = {"prompt_token_ids": list(request.prompt)} if self._job.return_token_ids else {}
        empty = {"role": "assistant", "content": ""}
        return [
            {"index": first + i, "delta": empty, "logprobs": None, "finish_reason": None, **extra}
            for i in range(request.n)
        ]

    def step(self, number: int, delta: Delta) -> list[dict[str, Any]]:
        chunks = []
        logprobs = self._logprobs([delta])
        extra = {"token_ids": list(delta.tokens)} if self._job.return_token_ids else {}
        if delta.text or logprobs is not None or (extra and delta.tokens):
            chunk = {"index": number, "delta": {"content": delta.text}, "logprobs": logprobs, "finish_reason": None}
            chunks.append({**chunk, **extra})
        if delta.finish_reason is not None:
            end = {"index": number, "delta": {}, "logprobs": None, "finish_reason": delta.finish_reason}
            chunks.append({**end, "stop_reason": delta.stop_reason})
        return chunks

    def complete(self, number: int, source: int, started: Started, deltas: list[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        choice = {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(deltas),
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }
        if self._job.return_token_ids:
            choice["prompt_token_ids"] = list(self._job.requests[source].prompt)
            choice["token_ids"] = [token for delta in deltas for token in delta.tokens]
        return choice

    def _logprobs(self, deltas: list[Delta]) -> dict[str, Any] | None:
        if self._job.logprobs is None or not any(delta.tokens for delta in deltas):
            return None
        tokens = [item for delta in deltas for item in delta.logprobs]
        return chat_logprobs(self._coder, tokens, self._job.logprobs)
