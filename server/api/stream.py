"""Events from the engine's thread to the event loop, and from there to the client as server-sent events."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossamer.server.api.errors import ClientGone, Interrupted, encode, status_and_body
from gossamer.server.engine.request import Event

logger = logging.getLogger("gossamer.http")

MAX_PENDING = 32_768  # events of one call that its client has not taken yet
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


class EventQueue:
    """One call's events, tagged with the number of the prompt they belong to. Made and read on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[int, Event]] = deque()
        self._ready = asyncio.Event()
        self._error: Exception | None = None

    def publisher(self, source: int) -> Callable[[Event], None]:
        """What the engine calls, on its own thread, for prompt number `source`. Never blocks."""

        def publish(event: Event) -> None:
            if self._error is not None:
                return
            if len(self._pending) >= MAX_PENDING:
                self._error = Interrupted(
                    "The client reads more slowly than the model writes, and too much is waiting."
                )
            self._pending.append((source, event))
            self._wake()

        return publish

    @property
    def pending(self) -> bool:
        return bool(self._pending) or self._error is not None

    def fail(self, error: Exception) -> None:
        """Let the reader meet `error` next; any thread. What comes later is dropped."""
        self._error = self._error or error
        self._wake()

    async def get(self, timeout: float | None) -> tuple[int, Event] | None:
        """The next event, or None after `timeout` seconds without one. Raises what was given to `fail`."""
        while self._error is None and not self._pending:
            self._ready.clear()
            if self._pending or self._error is not None:  # came between the look and the clear
                break
            try:
                async with asyncio.timeout(timeout):
                    await self._ready.wait()
            except TimeoutError:
                return None
        if self._error is not None:
            raise self._error
        return self._pending.popleft()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop has closed: nobody is waiting any more
            self._error = self._error or Interrupted("The server is shutting down.")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; when the client leaves first, `work` is cancelled and ClientGone raised.

    The request's body must have been read: from then on all that can be received is the disconnect.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def data(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


class EventStream(Response):
    """A stream that always ends in what `frames` ends in, in an error event and [DONE], or in a cut connection."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], close: Callable[[], None], request_id: str) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.frames = frames
        self.close = close
        self.request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._pump(send))
        finally:
            self.close()

    async def _pump(self, send: Send) -> None:
        try:
            async for frame in self.frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except Exception as error:
            status, body, _ = status_and_body(error, self.request_id)
            if status == 500:
                logger.error("request %s failed while streaming", self.request_id, exc_info=error)
            await send({"type": "http.response.body", "body": data(body) + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
