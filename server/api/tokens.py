"""POST /tokenize and /detokenize, GET /tokenizer_info: for clients that count tokens."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from gossamer.server.api.body import parse_object
from gossamer.server.api.chat import encode_messages
from gossamer.server.api.errors import encode
from gossamer.server.api.job import check_text
from gossamer.server.api.logprobs import spell
from gossamer.server.api.schemas import (
    DetokenizeRequest,
    TokenizeChat,
    TokenizePrompt,
    body_schema,
    read_fields,
    read_tokens,
)
from gossamer.server.api.service import Service
from gossamer.server.api.stream import unless_gone
from gossamer.server.engine.request import InvalidRequest


def token_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=body_schema(TokenizePrompt))
    @router.post("/v1/tokenize", openapi_extra=body_schema(TokenizePrompt))
    async def tokenize(http: HTTPRequest) -> Response:
        return await _text_work(service, http, tokenize_body)

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
    @router.post("/v1/detokenize", openapi_extra=body_schema(DetokenizeRequest))
    async def detokenize(http: HTTPRequest) -> Response:
        return await _text_work(service, http, detokenize_body)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return Response(encode(dict(service.engine.tokenizer.info())), media_type="application/json")

    return router


async def _text_work(service: Service, http: HTTPRequest, work: Any) -> Response:
    call = service.enter()
    try:
        raw = await service.body(http)
        body = await unless_gone(http.receive, service.in_thread(work, service, raw))
    finally:
        call.close()
    return Response(encode(body), media_type="application/json")


def tokenize_body(service: Service, raw: bytes) -> dict[str, Any]:
    """Any thread. A text, or messages with the chat template applied. Raises InvalidRequest or HTTPError."""
    given = parse_object(raw)
    coder, limit = service.engine.tokenizer, service.engine.model.max_model_len
    fields: TokenizeChat | TokenizePrompt
    if given.get("messages") is not None:
        fields = read_fields(TokenizeChat, given)
        service.model_named(fields.model)
        tokens = encode_messages(service, fields, dict(fields.chat_template_kwargs))
    else:
        fields = read_fields(TokenizePrompt, given)
        service.model_named(fields.model)
        check_text(fields.prompt, limit, "prompt")
        tokens = coder.encode(fields.prompt, add_special_tokens=fields.add_special_tokens)
    texts = [spell(coder, token) for token in tokens] if fields.return_token_strs else None
    return {"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": texts}


def detokenize_body(service: Service, raw: bytes) -> dict[str, Any]:
    """Any thread. Raises InvalidRequest or HTTPError."""
    fields = read_fields(DetokenizeRequest, parse_object(raw))
    service.model_named(fields.model)
    tokens = read_tokens(fields.tokens, "tokens", service.engine.model.vocab_size)
    if len(tokens) > 4 * service.engine.model.max_model_len:
        raise InvalidRequest(f"tokens may hold at most {4 * service.engine.model.max_model_len} ids.", param="tokens")
    return {"prompt": service.engine.tokenizer.decode(tokens, skip_special_tokens=fields.skip_special_tokens)}
