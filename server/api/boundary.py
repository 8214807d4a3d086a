"""The outermost layer of the app: names each request, turns every exception into an answer, counts and logs."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gossamer.server.api.errors import CLIENT_GONE, ClientGone, HTTPError, error_response

logger = logging.getLogger("gossamer.http")
access = logging.getLogger("gossamer.access")

MAX_HEADERS = 128
_LABEL = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LINGER_SECONDS = 5.0
_LINGER_BYTES = 64 * 1024 * 1024


class Boundary:
    """Adds X-Request-Id to each answer: the client's own where it is a plain label, else a new one."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None], access_log: bool) -> None:
        self.app = app
        self.count = count
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _label(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        began, status, started = time.monotonic(), 0, False

        async def send_labelled(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            _check_framing(scope)
            await self.app(scope, receive, send_labelled)
        except ClientGone:
            status = CLIENT_GONE
            if not started:  # nobody reads it, but the server wants an answer to every request
                await error_response(HTTPError(CLIENT_GONE, "The client left."))(scope, receive, send_labelled)
                status = CLIENT_GONE
        except Exception as error:
            if started:
                logger.exception("request %s failed in the middle of its answer", request_id)
                raise  # cuts the connection: a clean end would pass for a complete answer
            response = error_response(error, request_id)
            if response.status_code == 500:
                logger.exception("request %s failed", request_id)
            linger = isinstance(error, HTTPError) and error.linger
            await response(scope, receive, _lingering(receive, send_labelled) if linger else send_labelled)
        finally:
            self.count(_route(scope), status)
            if self.access_log:
                seconds = time.monotonic() - began
                access.info("%s %s %d %.3fs %s", scope["method"], _route(scope), status, seconds, request_id)


def _label(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    text = given[0].decode("latin-1") if len(given) == 1 else ""
    return text if _LABEL.fullmatch(text) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The route's pattern, so that what clients make up never becomes a label."""
    return str(getattr(scope.get("route"), "path", "unmatched"))


def _check_framing(scope: Scope) -> None:
    names = [name for name, _ in scope["headers"]]
    close = {"connection": "close"}
    if len(names) > MAX_HEADERS:
        raise HTTPError(431, f"A request may carry at most {MAX_HEADERS} headers.", headers=close)
    if b"content-length" in names and b"transfer-encoding" in names:
        raise HTTPError(400, "Send either Content-Length or Transfer-Encoding, not both.", headers=close)


def _lingering(receive: Receive, send: Send) -> Send:
    """Sends the answer at once, then takes in what the client is still sending before the connection closes.

    Closing on unread data resets the connection, and the client would never see why it was refused.
    """

    async def deliver(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        taken = 0
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while taken < _LINGER_BYTES:
                    part = await receive()
                    if part["type"] != "http.request" or not part.get("more_body", False):
                        break
                    taken += len(part["body"])
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return deliver
