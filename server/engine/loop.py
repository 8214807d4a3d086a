"""The engine's loop: accept what came in, plan, launch a step, publish the one before it. One thread, and all that it
alone may touch.

On a GPU a step runs while the next one is planned and launched, so the device need not wait for the host. All that the
next step has to know of the one before is how many tokens that chooses; the tokens themselves it takes on the device. A
choice may turn out to have ended by then (an end token, a stop string, a cancellation): one token more is then computed
for it, and nobody is told. Its pages can be given away at once: whatever uses them next is launched behind that.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from gossamer.server.engine.admission import QueueLoad
from gossamer.server.engine.choice import NOT_FINITE
from gossamer.server.engine.executor import Executor, Launched, Outcome
from gossamer.server.engine.inflight import InFlight
from gossamer.server.engine.observer import Observer
from gossamer.server.engine.quality import Guard
from gossamer.server.engine.records import FirstToken, RequestRecord, StepRecord
from gossamer.server.engine.request import AttentionUse, Event, FinishReason, Progress, Started
from gossamer.server.engine.scheduler import Part, Scheduler
from gossamer.server.engine.sequence import Sequence

_log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # how often an idle loop turns
HUNG_SECONDS = 60.0  # a step counts as hung after this long, or ten times its prediction if that is longer
MOST_FAILURES = 3  # failed steps in a row after which the engine gives up
STEP_FAILED = (
    "The server failed while computing this answer; try again, and look into the server's log if it happens again."
)
SHUT_DOWN = "The server shut down before the answer was complete; try again."
DEAD = "The engine has failed and the server has to be restarted."


@dataclass(frozen=True, slots=True)
class Submit:
    flight: InFlight


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    deadline: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A step that was launched and whose results have not been read."""

    parts: list[Part]
    launched: Launched
    predicted: float  # seconds


@dataclass(slots=True)
class Loop:
    """`run` is the engine thread. Others may put commands into `inbox` and read `accepting` and the times."""

    scheduler: Scheduler
    executor: Executor
    load: QueueLoad
    observer: Observer
    guard: Guard
    audit: bool = False  # check the page books after every step
    ahead: bool = False  # launch a step before the one before it is read
    inbox: "SimpleQueue[Submit | Cancel | Stop]" = field(default_factory=SimpleQueue)
    accepting: bool = True
    _open: dict[str, InFlight] = field(default_factory=dict)
    _deadline: float | None = None  # of draining
    _under_way: deque[UnderWay] = field(default_factory=deque)  # in order; at most one when the loop turns
    _step_began: float | None = None  # or when the step before it was complete; None while there is nothing to do
    _step_predicted: float = 0.0  # seconds, of all that is under way
    _failures: int = 0
    _dead: bool = False

    def run(self) -> None:
        """Until stopped. An error outside a step ends the engine, and every open request with it."""
        try:
            while not self._done():
                self._receive()
                self._turn()
            while self._under_way and not self._dead:
                self._finish(self._under_way.popleft())
        except Exception:
            _log.exception("the engine's loop failed")
            self._dead = True
        finally:
            self.accepting = False
            self._step_began = None
            self._receive_rest()
            self._end_all(DEAD if self._dead else SHUT_DOWN)

    def heartbeat_age(self) -> float:
        """Seconds that the current step has been running; 0 while there is nothing to do."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def liveness(self) -> tuple[bool, str]:
        """Whether the loop can still make progress, and if not, why."""
        if self._dead:
            return False, DEAD
        age = self.heartbeat_age()
        if age > max(HUNG_SECONDS, 10 * self._step_predicted):
            return False, f"A step has been running for {age:.0f} seconds."
        return True, ""

    def _done(self) -> bool:
        if self._dead:
            return True
        return self._deadline is not None and (not self._open or time.monotonic() >= self._deadline)

    def _receive(self) -> None:
        """Take what came in; wait for it when there is nothing to compute."""
        idle = not self.scheduler.running and not self.scheduler.waiting and not self._under_way
        if idle:
            self._step_began = None
        if idle and self._deadline is not None and not self._open:
            return
        try:
            self._accept(self.inbox.get(timeout=IDLE_SECONDS) if idle else self.inbox.get_nowait())
            while True:
                self._accept(self.inbox.get_nowait())
        except Empty:
            return

    def _receive_rest(self) -> None:
        try:
            while True:
                self._accept(self.inbox.get_nowait())
        except Empty:
            return

    def _accept(self, command: Submit | Cancel | Stop) -> None:
        match command:
            case Submit(flight):
                self._open[flight.request.id] = flight
                for sequence in flight.choices:
                    self.scheduler.add(sequence)
            case Cancel(request_id):
                if request_id in self._open:
                    cancelled = self._open[request_id]
                    for sequence in list(cancelled.choices):
                        self._end(cancelled, sequence, "abort")
            case Stop(deadline):
                self.accepting = False
                self._deadline = deadline

    def _turn(self) -> None:
        """Launch a step, then publish the one before it, or this one where steps are not launched ahead."""
        parts = self.scheduler.plan()
        launched = bool(parts) and self._launch(parts)
        most = 1 if launched and self.ahead else 0
        while len(self._under_way) > most:
            self._finish(self._under_way.popleft())
        if parts and not launched:
            self._fail(parts)

    def _launch(self, parts: list[Part]) -> bool:
        """False when the step failed. What is under way goes on; of what failed, nothing is known to the cache."""
        began = time.monotonic()
        predicted = self.scheduler.pace.predict(_work(parts))
        self._step_predicted = predicted + sum(step.predicted for step in self._under_way)
        if self._step_began is None:
            self._step_began = began
        self._note_admitted(parts, began)
        try:
            launched = self.executor.launch(parts, self._under_way[-1].launched if self._under_way else None)
        except Exception:
            _log.exception("a step failed; its requests end with an error")
            return False
        self.scheduler.launched(parts)
        self._under_way.append(UnderWay(parts, launched, predicted))
        return True

    def _finish(self, step: UnderWay) -> None:
        """Wait for a step's results and publish them."""
        try:
            outcome = self.executor.collect(step.launched)
            self._failures = 0
        except Exception:
            _log.exception("a step failed; its requests end with an error")
            self.scheduler.cache.clear_prefixes()  # its pages can be found already
            self._fail(step.parts)
            return
        assert self._step_began is not None
        began, self._step_began = self._step_began, time.monotonic()
        seconds = self._step_began - began
        self._step_predicted = sum(each.predicted for each in self._under_way)
        self.scheduler.arrived(step.parts)
        open_parts = [part for part in step.parts if not part.sequence.ended]
        generated = self._publish(step.parts, outcome)
        self.scheduler.pace.learn(_work(step.parts), seconds)
        for checked in outcome.checked:
            self.guard.note(checked)
            self.observer.checked(checked)
        if self.audit:
            self.scheduler.cache.audit()
        if open_parts:
            self.observer.step(_step_record(open_parts, step.launched, generated, seconds))

    def _note_admitted(self, parts: Items[Part], now: float) -> None:
        """Sequences that compute for the first time stop counting as waiting."""
        for part in parts:
            sequence = part.sequence
            if sequence.admitted_at is None:
                sequence.admitted_at = now
                self._unqueue(self._open[sequence.request.id], sequence)

    def _unqueue(self, flight: InFlight, sequence: Sequence) -> None:
        if sequence.index not in flight.unqueued:
            flight.unqueued.add(sequence.index)
            self.load.leave(1, 0)

    def _prompt_done(self, flight: InFlight) -> None:
        if flight.prompt_counted:
            flight.prompt_counted = False
            self.load.leave(0, len(flight.request.prompt))

    def _publish(self, parts: Items[Part], outcome: Outcome) -> int:
        """How many tokens were published."""
        now, published = time.monotonic(), 0
        for part, reads in zip(parts, outcome.reads, strict=True):
            sequence = part.sequence
            if sequence.ended:
                continue  # since the step was launched, or with another choice of its request just now
            sequence.reads = sequence.reads.plus(reads)
            flight = self._open[sequence.request.id]
            if sequence in outcome.not_finite:
                self._break_off(flight, NOT_FINITE)
                continue
            if not part.samples:
                if not flight.started:
                    self._send(flight, Progress(computed=part.first + part.new, total=sequence.prompt_length))
                continue
            if not flight.started:
                flight.started = True
                self._prompt_done(flight)
                scored = tuple(sequence.prompt_logprobs) if sequence.request.prompt_logprobs is not None else None
                self._send(flight, Started(cached_tokens=sequence.cached, prompt_logprobs=scored))
            choice = flight.choices.get(sequence)
            if choice is None:
                continue  # the callback failed
            sampled = outcome.sampled.get(sequence)
            delta = choice.finish_empty() if sampled is None else choice.accept(sampled)
            published += len(delta.tokens)
            self._note_token(flight, sequence, now)
            if (reason := delta.finish_reason) is not None:
                delta = replace(delta, attention=self._attention(sequence))
                self._end(flight, sequence, reason)
            self._send(flight, delta)
        return published

    def _attention(self, sequence: Sequence) -> AttentionUse:
        cache, reads = self.scheduler.cache, sequence.reads
        # Not what its table holds now: that may have grown for a token that nobody will see.
        length, size = sequence.settled, cache.page_size
        held = [-(-length // size) - len(rule.released(length, size)) for rule in sequence.table.rules]
        whole = reads.prefill_read + reads.decode_read >= reads.prefill_possible + reads.decode_possible
        return AttentionUse(
            point=sequence.point.name,
            **reads._asdict(),
            kv_bytes=sum(pages * pool.bytes_per_page for pages, pool in zip(held, cache.pools, strict=True)),
            dense_because=None if not whole else "policy" if sequence.point.is_dense else "short",
        )

    def _send(self, flight: InFlight, event: Event) -> None:
        """Publish. A request whose callback fails is dropped, as if it had been cancelled, and nobody else notices."""
        try:
            flight.publish(event)
        except Exception:
            _log.exception("publishing to request %s failed; the request is dropped", flight.request.id)
            for sequence in list(flight.choices):
                self._end(flight, sequence, "abort")

    def _note_token(self, flight: InFlight, sequence: Sequence, now: float) -> None:
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self.observer.first_token(FirstToken(seconds=now - flight.arrived))
        elif sequence.last_token_at is not None:
            self.observer.inter_token(now - sequence.last_token_at)
        sequence.last_token_at = now

    def _fail(self, parts: Items[Part]) -> None:
        """The step is lost: its requests end, the others go on, and too many failures in a row end the engine."""
        self._step_began = time.monotonic()
        self._failures += 1
        self._dead = self._failures >= MOST_FAILURES
        for part in parts:
            if not part.sequence.ended:
                self._break_off(self._open[part.sequence.request.id], STEP_FAILED)

    def _break_off(self, flight: InFlight, message: str) -> None:
        """End every open choice of a request with an error."""
        for sequence, choice in list(flight.choices.items()):
            if not sequence.ended:
                self._end(flight, sequence, "error")
                self._send(flight, choice.fail(message))

    def _end_all(self, message: str) -> None:
        for flight in list(self._open.values()):
            self._break_off(flight, message)

    def _end(self, flight: InFlight, sequence: Sequence, reason: FinishReason) -> None:
        """Free the pages and the books of one choice."""
        attention = self._attention(sequence)
        self.scheduler.remove(sequence)
        del flight.choices[sequence]
        self._unqueue(flight, sequence)
        self.observer.finished(_request_record(flight, sequence, reason, attention))
        if not flight.choices:
            self._prompt_done(flight)
            del self._open[flight.request.id]


def _work(parts: Items[Part]) -> list[tuple[int, int]]:
    return [(part.first, part.new) for part in parts]


def _step_record(parts: Items[Part], launched: Launched, generated: int, seconds: float) -> StepRecord:
    prompt = sum(min(p.new, max(0, p.sequence.prompt_length - p.first)) for p in parts)
    return StepRecord(
        prompt_tokens=prompt,
        generated_tokens=generated,
        sequences=len(parts),
        seconds=seconds,
        model_seconds=launched.model_seconds,
        select_seconds=launched.select_seconds,
        attend_seconds=launched.attend_seconds,
    )


def _request_record(
    flight: InFlight, sequence: Sequence, reason: FinishReason, attention: AttentionUse
) -> RequestRecord:
    now = time.monotonic()
    admitted = sequence.admitted_at
    first, last = sequence.first_token_at, sequence.last_token_at
    return RequestRecord(
        finish_reason=reason,
        prompt_tokens=sequence.prompt_length,
        cached_tokens=sequence.cached,
        generated_tokens=sequence.generated,
        max_tokens=sequence.request.params.max_tokens,
        n=sequence.request.n,
        preemptions=sequence.preemptions,
        end_to_end=now - flight.arrived,
        queued=(admitted or now) - flight.arrived,
        prefill=0.0 if admitted is None else (first or now) - admitted,
        decode=0.0 if first is None or last is None else last - first,
        point=sequence.point.name,
        attention=attention,
    )
