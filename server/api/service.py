"""What all routes share: the engine, the limits before it, the threads for text work, and the calls that are open."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from starlette.requests import Request as HTTPRequest

from gossamer.server.api.body import check_content_type, read_body
from gossamer.server.api.errors import GenerationFailed, HTTPError, Interrupted
from gossamer.server.api.facade import OpenRequest, ServingEngine
from gossamer.server.api.stream import EventQueue
from gossamer.server.config import ServerConfig
from gossamer.server.engine.request import Delta, Event, Overloaded, Request, Unavailable
from gossamer.server.metrics import Metrics

TEXT_THREADS = 4

P = ParamSpec("P")
T = TypeVar("T")


class Service:
    """One per app. Touched by the event loop alone, except where a method says otherwise."""

    def __init__(self, engine: ServingEngine, config: ServerConfig, metrics: Metrics) -> None:
        self.engine = engine
        self.config = config
        self.metrics = metrics
        self.draining = False
        self.calls: set[Call] = set()
        self.most_calls = config.queued_requests + config.max_num_seqs
        self.body_limit = config.max_body_size or 4 * 2**20 + 16 * engine.model.max_model_len
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")

    def enter(self) -> "Call":
        """Let one more call in, before anything is read from it. Raises Unavailable or Overloaded."""
        if self.draining:
            raise Unavailable("The server is shutting down; send the request to another one.")
        if len(self.calls) >= self.most_calls:
            self.metrics.rejected("max_open_calls")
            raise Overloaded(
                f"The server is busy with {len(self.calls)} requests; try again later.", reason="max_open_calls"
            )
        return Call(self)

    async def body(self, request: HTTPRequest) -> bytes:
        check_content_type(request)
        return await read_body(request, self.body_limit, self.config.read_timeout)

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run text work (parsing, templates, tokenising) where it does not hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))

    def model_named(self, name: str | None) -> str:
        """The name that the answer carries. Any thread. Raises HTTPError 404."""
        names = self.engine.model.names
        if name is None:
            return names[0]
        if name not in names:
            shown = name if len(name) <= 100 else name[:99] + "…"
            raise HTTPError(
                404,
                f"There is no model {shown!r} here; this server has {', '.join(names)}.",
                code="model_not_found",
                param="model",
            )
        return name

    def interrupt(self, reason: str) -> None:
        """End every open call with an error."""
        for call in tuple(self.calls):
            call.fail(Interrupted(reason))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Call:
    """One HTTP request that makes the engine work, from before its body is read until its answer is out or given up."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._queue = EventQueue()
        self._tickets: list[OpenRequest] = []
        self._choices = 0
        self._heard = False  # whether the engine has begun with any of it
        self._patience = 0.0
        service.calls.add(self)

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand all prompts to the engine, or none. Raises what the engine raises."""
        for source, request in enumerate(requests):
            self._tickets.append(self._service.engine.submit(request, self._queue.publisher(source)))
            self._choices += request.n
        self._patience = time.monotonic() + self._service.config.queue_timeout

    async def next(self, timeout: float | None = None) -> tuple[int, Event] | None:
        """The next event and its prompt's number; None after `timeout` seconds.

        Raises GenerationFailed or Interrupted when the engine gave a choice up.
        """
        if not self._heard:
            left = max(0.0, self._patience - time.monotonic())
            timeout = left if timeout is None else min(left, timeout)
        item = await self._queue.get(timeout)
        self._heard = self._heard or item is not None
        if not self._heard and time.monotonic() >= self._patience:
            self._service.metrics.rejected("queue_timeout")
            raise Interrupted("The request waited too long for its turn; try again later.")
        if item is not None and isinstance(item[1], Delta) and item[1].finish_reason is not None:
            self._choices -= 1
            if item[1].finish_reason == "error":
                raise GenerationFailed(item[1].message or "The engine failed on this request.")
            if item[1].finish_reason == "abort":
                raise Interrupted(item[1].message or "The server gave this request up; try again.")
        return item

    @property
    def finished(self) -> bool:
        """Every choice has been taken from the queue to its end."""
        return self._choices == 0

    @property
    def pending(self) -> bool:
        """`next` would not have to wait."""
        return self._queue.pending

    def fail(self, error: Exception) -> None:
        self._queue.fail(error)

    def close(self) -> None:
        """Cancel what still runs. May be called more than once."""
        self._service.calls.discard(self)
        for ticket in self._tickets:
            ticket.cancel()
        self._tickets.clear()
