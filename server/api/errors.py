"""Every error answer of the server, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import http
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gossamer.server.engine.request import InvalidRequest, Overloaded, RequestError, Unavailable

MAX_MESSAGE = 2000  # characters of an error message
MAX_PARAM = 100
CLIENT_GONE = 499  # for logs and metrics; nobody reads the answer


class HTTPError(Exception):
    """An answer other than 200 that HTTP itself asks for: too large, too slow, no key, not found."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        linger: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.linger = linger  # the client may still be sending: let it finish, so that it reads the answer


class GenerationFailed(RequestError):
    """The engine could not finish this request, through no fault of the client's: 500."""


class Interrupted(RequestError):
    """The engine gave the request up before it was done (it waited too long, or the server stops): 503."""


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


def _type_of(status: int) -> str:
    names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    if status in names:
        return names[status]
    if status == 503:
        return "service_unavailable_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def status_and_body(error: Exception, request_id: str = "") -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and extra headers for any exception. What is not ours becomes a 500 that names the request only."""
    message, param, code = str(error), None, None
    headers: dict[str, str] = {}
    if isinstance(error, InvalidRequest):
        status, param, code = 400, error.param, error.code
    elif isinstance(error, Overloaded | Unavailable):
        status, headers = 503, {"retry-after": str(error.retry_after)}
        code = error.reason if isinstance(error, Overloaded) else None
    elif isinstance(error, Interrupted):
        status, headers = 503, {"retry-after": "5"}
    elif isinstance(error, GenerationFailed):
        status = 500
    elif isinstance(error, RequestError):
        status = 400
    elif isinstance(error, HTTPError):
        status, param, code, headers = error.status, error.param, error.code, error.headers
    elif isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        message = {404: "There is nothing at this path.", 405: "This path does not answer that method."}.get(
            status, http.HTTPStatus(status).phrase + "."
        )
    else:
        status, code = 500, "internal_error"
        message = (
            f"The server failed on this request; its log says more under {request_id or 'the time of the request'}."
        )
    message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
    param = param[:MAX_PARAM] if param is not None else None
    return status, {"error": {"message": message, "type": _type_of(status), "param": param, "code": code}}, headers


def error_response(error: Exception, request_id: str = "") -> Response:
    status, body, headers = status_and_body(error, request_id)
    return Response(encode(body), status, headers, media_type="application/json")


def encode(value: object) -> bytes:
    """JSON bytes. What orjson refuses is made writable: lone surrogates are replaced, huge integers become floats."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return orjson.dumps(_writable(value))


def _writable(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value)
    if isinstance(value, dict):
        return {str(_writable(k)): _writable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    return value
