"""From the engine's events to one JSON answer or a stream of chunks. What differs by endpoint is a `Form`."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from gossamer.server.api.errors import encode
from gossamer.server.api.job import POLICY_HEADER, Job
from gossamer.server.api.service import Call, Service
from gossamer.server.api.stream import DONE, EventStream, data, unless_gone
from gossamer.server.engine.request import AttentionUse, Delta, Progress, RequestError, Started

WRITE_BYTES = 16 * 1024  # frames that are ready together are written together, up to about so much


class Form(Protocol):
    """How one endpoint spells its answer. Made per call; choices are numbered through all prompts."""

    whole: str  # "object" of the complete answer
    piece: str  # "object" of a chunk

    def begin(self, first: int, source: int, started: Started) -> list[dict[str, Any]]:
        """Chunks for the choices of prompt `source`, the first of which is number `first`."""
        ...

    def step(self, number: int, delta: Delta) -> list[dict[str, Any]]:
        """Chunks for what one delta adds to choice `number`."""
        ...

    def complete(self, number: int, source: int, started: Started, deltas: list[Delta]) -> dict[str, Any]:
        """Choice `number` as a whole."""
        ...


class Usage:
    """Tokens of one call so far: prompts once each, whatever n is."""

    def __init__(self) -> None:
        self.prompt = self.cached = self.generated = 0
        self.attention: list[AttentionUse] = []  # of the choices that have ended

    def count(self, job: Job, source: int, event: Started | Delta) -> None:
        if isinstance(event, Delta):
            self.generated += len(event.tokens)
            if event.attention is not None:
                self.attention.append(event.attention)
        else:
            self.prompt += len(job.requests[source].prompt)
            self.cached += event.cached_tokens

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if self.attention:
            body["attention"] = _attention(self.attention)
        return body


def _attention(uses: list[AttentionUse]) -> dict[str, Any]:
    """What attention read for all choices of a call; a density is null where nothing was computed (a prompt that was
    wholly cached, an answer of one token)."""

    def density(read: float, possible: float) -> float | None:
        return round(min(1.0, read / possible), 4) if possible else None

    return {
        "policy": uses[0].point,
        "prefill_density": density(sum(u.prefill_read for u in uses), sum(u.prefill_possible for u in uses)),
        "decode_density": density(sum(u.decode_read for u in uses), sum(u.decode_possible for u in uses)),
        "kv_bytes": sum(u.kv_bytes for u in uses),
        "dense_because": uses[0].dense_because,
    }


async def answer(
    service: Service,
    http: HTTPRequest,
    prepare: Callable[[Service, bytes, str | None], Job],
    form_of: Callable[[Service, Job], Form],
) -> Response:
    """Read, check, submit and answer one request; the client may leave at any moment."""
    call = service.enter()
    try:
        raw = await service.body(http)
        header = ", ".join(http.headers.getlist(POLICY_HEADER)) or None  # a repeated header is a list
        job = await unless_gone(http.receive, service.in_thread(prepare, service, raw, header))
        call.submit(job.requests)
        form = form_of(service, job)
        if not job.stream:
            body = await unless_gone(http.receive, _whole(call, job, form))
            call.close()
            return Response(encode(body), media_type="application/json")
    except BaseException:
        call.close()
        raise
    frames = _frames(call, job, form, service.config.sse_keep_alive_interval)
    return EventStream(frames, call.close, http.state.request_id)


def _envelope(job: Job, kind: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": job.model,
        "system_fingerprint": job.fingerprint,
    }


def _first_choices(job: Job) -> list[int]:
    """The number of each prompt's first choice."""
    firsts, total = [], 0
    for request in job.requests:
        firsts.append(total)
        total += request.n
    return firsts


async def _whole(call: Call, job: Job, form: Form) -> dict[str, Any]:
    firsts, usage = _first_choices(job), Usage()
    starts: dict[int, Started] = {}
    deltas: list[list[Delta]] = [[] for _ in range(job.choices)]
    while not call.finished:
        item = await call.next()
        assert item is not None, "without a time-out there is always an event"
        source, event = item
        if isinstance(event, Progress):
            continue
        usage.count(job, source, event)
        if isinstance(event, Started):
            starts[source] = event
        else:
            deltas[firsts[source] + event.index].append(event)
    choices = [
        form.complete(firsts[source] + index, source, starts[source], deltas[firsts[source] + index])
        for source, request in enumerate(job.requests)
        for index in range(request.n)
    ]
    return {**_envelope(job, form.whole), "choices": choices, "usage": usage.body()}


async def _frames(call: Call, job: Job, form: Form, interval: float) -> AsyncIterator[bytes]:
    """The stream's bytes, with a comment whenever nothing was sent for `interval` seconds.

    One event is one frame; frames that are ready at the same time are written at once.
    """
    firsts, usage = _first_choices(job), Usage()
    envelope = _envelope(job, form.piece)
    heartbeat = Heartbeat(interval)
    ready = b""
    try:
        while not call.finished:
            item = await call.next(heartbeat.rest())
            if item is None:
                yield heartbeat.comment()
                continue
            source, event = item
            if isinstance(event, Progress):
                heartbeat.note(source, event)
                chunks = []
            else:
                usage.count(job, source, event)
                if isinstance(event, Started):
                    chunks = form.begin(firsts[source], source, event)
                else:
                    chunks = form.step(firsts[source] + event.index, event)
            for chunk in chunks:
                ready += data({**envelope, "choices": [chunk], **_running_usage(job, usage)})
            if ready and (len(ready) > WRITE_BYTES or not call.pending):
                yield ready
                ready = b""
                heartbeat.sent()
    except RequestError:
        if ready:
            yield ready
        raise
    if job.include_usage:
        ready += data({**envelope, "choices": [], "usage": usage.body()})
    yield ready + DONE


def _running_usage(job: Job, usage: Usage) -> dict[str, Any]:
    if job.continuous_usage:
        return {"usage": usage.body()}
    return {"usage": None} if job.include_usage else {}


class Heartbeat:
    """When the next comment is due, and how far the prompts are. Proxies cut streams that stay silent."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._prompts: dict[int, Progress] = {}
        self.sent()

    def sent(self) -> None:
        self._due = _now() + self._interval

    def note(self, source: int, progress: Progress) -> None:
        self._prompts[source] = progress

    def rest(self) -> float | None:
        """Seconds until a comment is due; None: never."""
        return max(0.0, self._due - _now()) if self._interval else None

    def comment(self) -> bytes:
        self.sent()
        done = sum(progress.computed for progress in self._prompts.values())
        total = sum(progress.total for progress in self._prompts.values())
        return f": keep-alive {done}/{total} prompt tokens\n\n".encode() if total else b": keep-alive\n\n"


def _now() -> float:
    return time.monotonic()
