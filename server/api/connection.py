"""Connections with time-outs: uvicorn itself waits for ever for headers, and for clients that do not read."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from gossamer.server.api.errors import HTTPError, encode, status_and_body

MAX_HEADER_BYTES = 32 * 1024


class TimedConnection(H11Protocol):
    """Closes when a request's headers take longer than `read_seconds`; aborts when nothing can be written for
    `write_seconds`. Between requests uvicorn's keep-alive time-out counts."""

    read_seconds = 30.0
    write_seconds = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if not self._answering() and self._reading is None:
            self._expect_headers()
        super().data_received(data)
        if self._answering():
            self._headers_came()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        self._wrote()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._wrote()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP request gets the same shape of error as all others."""
        _, body, _ = status_and_body(HTTPError(400, "This is not a valid HTTP/1.1 request."))
        data = encode(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=data), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        return cycle is not None and not cycle.response_complete

    def _expect_headers(self) -> None:
        self._reading = self.loop.call_later(self.read_seconds, self.transport.abort)

    def _headers_came(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _wrote(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


def timed_connection(read_seconds: float, write_seconds: float) -> type[TimedConnection]:
    """The connection class for uvicorn, with these time-outs."""
    return type("TimedConnection", (TimedConnection,), {"read_seconds": read_seconds, "write_seconds": write_seconds})
