"""From the socket to a checked JSON object: bounded in bytes, in time, in depth and in what it may contain."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from gossamer.server.api.errors import ClientGone, HTTPError
from gossamer.server.engine.request import InvalidRequest

MAX_DEPTH = 64
MAX_FIELDS = 512  # of one object, except where a schema says otherwise
_MIN_RATE = 64 * 1024  # bytes that must arrive within each read time-out

# Every JSON string, and whether a colon follows, that is, whether it is a key.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*+(:?)', re.DOTALL)


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """The whole body. Raises HTTPError 413, 415, 408, or ClientGone."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HTTPError(415, "Send the body without a Content-Encoding.", headers={"connection": "close"})
    too_large = HTTPError(
        413,
        f"The request body must not be larger than {limit} bytes.",
        headers={"connection": "close"},
        linger=request.headers.get("expect") is None,
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    body = bytearray()
    chunks = request.stream().__aiter__()
    try:
        while True:
            goal = len(body) + _MIN_RATE
            async with asyncio.timeout(timeout):
                while len(body) < goal:
                    body += await anext(chunks)
                    if len(body) > limit:
                        raise too_large
    except StopAsyncIteration:
        return bytes(body)
    except TimeoutError:
        raise HTTPError(408, "The request body came too slowly.", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None


def check_content_type(request: Request) -> None:
    """JSON, or nothing said. Raises InvalidRequest."""
    given = request.headers.get("content-type", "application/json")
    media = given.split(";")[0].strip().lower()
    if media not in ("application/json", "") and not media.endswith("+json"):
        raise InvalidRequest("Send the body as JSON, with Content-Type: application/json.")


def parse_object(raw: bytes) -> dict[str, Any]:
    """One JSON object without NaN, NUL, duplicate keys or lone surrogates. Raises InvalidRequest."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        where = f" (line {error.lineno}, column {error.colno})" if raw else ""
        raise InvalidRequest(f"The body is not valid JSON{where}: {_reason(error)}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    if len(value) > MAX_FIELDS:
        raise InvalidRequest(f"The body holds {len(value)} fields; it may hold at most {MAX_FIELDS}.")
    keys = sum(len(item) for item in _objects(value))
    if keys != sum(map(len, _STRINGS.findall(raw))):
        raise InvalidRequest("The body names a field twice.")
    if b"\\u0000" in raw and any("\0" in text for text in _texts(value)):
        raise InvalidRequest("The body holds a NUL character, which is not allowed.")
    return value


def _reason(error: orjson.JSONDecodeError) -> str:
    text = error.msg
    if "BOM" in text:
        return "it starts with a byte order mark"
    if "surrogate" in text:
        return "it holds text that is not valid Unicode"
    if "infinity" in text:
        return "it holds a number that is too large"
    if "depth" in text:
        return "it is nested too deeply"
    return re.sub(r"[^\x20-\x7e]", "?", text)[:100]


def _objects(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object in the body. Raises InvalidRequest where it is nested too deeply."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if type(item) is dict:
                yield item
                inner.extend(x for x in item.values() if type(x) is dict or type(x) is list)
            else:
                inner.extend(x for x in item if type(x) is dict or type(x) is list)
        if not inner:
            return
        level = inner
    raise InvalidRequest(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _texts(value: dict[str, Any]) -> Iterator[str]:
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if type(item) is str:
            yield item
        elif type(item) is dict:
            pending.extend(item)
            pending.extend(item.values())
        elif type(item) is list:
            pending.extend(item)
