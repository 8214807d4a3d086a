"""The engine as the API sees it: submit a request from any thread, get its events, cancel it."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gossamer import __version__
from gossamer.attention.policy import AttentionPolicy, OperatingPoint
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.retention import Retention
from gossamer.server.engine.choice import Choice
from gossamer.server.engine.inflight import InFlight
from gossamer.server.engine.logits import SampleRow
from gossamer.server.engine.loop import Cancel, Loop, Stop, Submit
from gossamer.server.engine.records import EngineStats, Health, RuleStats
from gossamer.server.engine.request import Event, InvalidRequest, Request, RequestError, SamplingParams, Unavailable
from gossamer.server.engine.sequence import Sequence
from gossamer.server.engine.stops import StopChecker
from gossamer.server.engine.tokenizer import Tokenizer

NOT_TAKING = "The server is not taking requests: it is starting, shutting down or has failed; try again later."
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that choices of one seed never meet (golden ratio, 64 bit)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What clients may know of the model."""

    name: str
    names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    created: int  # unix seconds
    root: str
    default_sampling: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that was accepted."""

    request_id: str
    _loop: Loop

    def cancel(self) -> None:
        """Give up the request, at whatever stage; its pages are free within one step. Any thread, any time."""
        self._loop.inbox.put(Cancel(self.request_id))


class Engine:
    """One replica. Its loop runs on a thread of its own; everything here may be called from any thread."""

    def __init__(
        self, *, card: ModelCard, tokenizer: Tokenizer, policy: AttentionPolicy, default_point: str,
        allowed_points: tuple[str, ...], cache: KVCache, loop: Loop, eos_ids: tuple[int, ...], token_capacity: int,
        seed: int | None,
    ) -> None:  # fmt: skip
        self.model = card
        self.tokenizer = tokenizer
        self.points = allowed_points
        self.all_points = policy.names
        self.default_point = default_point
        self.token_capacity = token_capacity
        self._policy = policy
        self.cache = cache
        self._loop = loop
        self._eos_ids = frozenset(eos_ids)
        self._seed = seed
        self._arrivals = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=loop.run, name="engine", daemon=True)

    @property
    def fingerprint(self) -> str:
        """Of the default operating point."""
        return self.fingerprint_of(None)

    def fingerprint_of(self, point: str | None) -> str:
        """For `system_fingerprint`: changes with the release, the policy and the operating point."""
        chosen = self._policy.point(self.point_for(point))
        return f"gossamer-{__version__}-{self._policy.name}@{chosen.name}-{chosen.fingerprint()}"

    def start(self) -> None:
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        """Take no more requests, give the open ones so long, end the rest with an error. Returns when done."""
        self._loop.inbox.put(Stop(time.monotonic() + drain_seconds))
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request, publish: Callable[[Event], None]) -> Ticket:
        """Accept a request or raise a RequestError at once. `publish` is called on the engine thread: never block."""
        point = self._policy.point(self.point_for(self._check_point(request)))
        self._check(request, point)
        if not self._loop.accepting or not self._thread.is_alive():
            raise Unavailable(NOT_TAKING)
        self._loop.load.enter(request.n, len(request.prompt))
        with self._lock:
            self._arrivals += 1
            arrival = self._arrivals
        self._loop.inbox.put(Submit(self._in_flight(request, point, arrival, publish)))
        if not self._thread.is_alive():  # it ended between the two checks, and will not answer
            raise Unavailable(NOT_TAKING)
        return Ticket(request.id, self._loop)

    def health(self) -> Health:
        alive, reason = self._loop.liveness()
        alive = alive and self._thread.is_alive()
        return Health(alive=alive, ready=alive and self._loop.accepting, reason=reason)

    def stats(self) -> EngineStats:
        rules = tuple(
            RuleStats(
                rule=pool.rule,
                pages=pool.pages,
                pages_owned=pool.pages_owned,
                pages_cached=pool.pages_cached,
                bytes_per_page=pool.bytes_per_page,
            )
            for pool in self.cache.stats()
        )
        scheduler = self._loop.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pending_prefill_tokens=self._loop.load.tokens,
            kv_usage=max((rule.pages_owned / rule.pages for rule in rules), default=0.0),
            kv_token_capacity=self.token_capacity,
            kv_dtype=self.cache.stored_as,
            prefix_queried_tokens=scheduler.queried_tokens,
            prefix_hit_tokens=scheduler.hit_tokens,
            preemptions=scheduler.preemptions,
            rules=rules,
            heartbeat_age=self._loop.heartbeat_age(),
            alarms=self._loop.guard.alarms(),
        )

    def _check_point(self, request: Request) -> str | None:
        """Raises InvalidRequest."""
        if request.point is not None and request.point not in self.points:
            raise InvalidRequest(
                f"The attention policy {request.point!r} does not exist here or may not be chosen; "
                f"choose one of: {', '.join(self.points)}.",
                param="attention.policy",
            )
        return request.point

    def point_for(self, asked: str | None) -> str:
        """The operating point of a new request that asks for this one, or for none: another one while that rests for
        its quality."""
        return self._loop.guard.instead_of(asked or self.default_point)

    def _check(self, request: Request, point: OperatingPoint) -> None:
        """All that can be known before queueing. Raises InvalidRequest."""
        card, params, length = self.model, request.params, len(request.prompt)
        if length + min(1, params.max_tokens) > card.max_model_len:
            raise InvalidRequest(
                f"The prompt holds {length} tokens, but this server takes at most {card.max_model_len} for prompt and "
                "answer together; shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        if length + params.max_tokens > card.max_model_len:
            raise InvalidRequest(
                f"The prompt holds {length} tokens and {params.max_tokens} are to be generated, but this server takes "
                f"at most {card.max_model_len} together; ask for at most {card.max_model_len - length}.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if min(request.prompt) < 0 or max(request.prompt) >= card.vocab_size:
            raise InvalidRequest(
                f"The prompt names a token outside the vocabulary of {card.vocab_size}.", param="prompt"
            )
        params.check_vocabulary(card.vocab_size)
        step_tokens = min(length, self._loop.scheduler.limits.step_tokens)
        needed = self.cache.pages_needed(self._rules(point), length + params.max_tokens, step_tokens)
        if any(need > have for need, have in zip(needed, self.cache.capacity, strict=True)):
            raise InvalidRequest(
                f"A sequence of {length + params.max_tokens} tokens can never fit the KV cache of this server, which "
                f"holds {self.token_capacity}; shorten the prompt or ask for fewer tokens.",
                param="prompt",
                code="context_length_exceeded",
            )

    def point(self, name: str) -> OperatingPoint:
        """An operating point of the policy. Raises KeyError."""
        return self._policy.point(name)

    def warm_up(self, tokens: int) -> None:
        """Compute a prompt of so many tokens at every point that may be asked for, before the engine starts."""
        for point in map(self._policy.point, dict.fromkeys((self.default_point, *self.points))):
            self._loop.executor.warm_up(point, self._rules(point), tokens)

    def _rules(self, point: OperatingPoint) -> tuple[Retention, ...]:
        """Per group of heads, what it keeps at this operating point."""
        firsts = (group.slots[0] for group in self.cache.groups)
        return tuple(point.heads[layer][heads[0]].keep for layer, heads in firsts)

    def _in_flight(
        self, request: Request, point: OperatingPoint, arrival: int, publish: Callable[[Event], None]
    ) -> InFlight:
        rules = self._rules(point)
        salt = f"{self._policy.name}/{point.fingerprint()}/{self.cache.pools[0].k.dtype}/{request.cache_salt}".encode(
            errors="surrogatepass"  # JSON can spell half a character
        )
        first = request.params.seed
        if first is None:
            first = secrets.randbits(63) if self._seed is None else self._seed + arrival
        flight = InFlight(request, publish, {}, time.monotonic())
        leader: Sequence | None = None
        for index in range(request.n):
            seed = (first + index * SEED_STRIDE) % 2**64
            row = SampleRow(request.params, seed=seed, prompt=request.prompt, forbid=self._forbidden(request.params))
            table = self.cache.table(rules, salt)
            sequence = Sequence(request, index, arrival, point, table, row, list(request.prompt), leader)
            leader = leader or sequence
            flight.choices[sequence] = self._choice(sequence)
        return flight

    def _forbidden(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that would end a choice, and so may not come before `min_tokens`."""
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)

    def _choice(self, sequence: Sequence) -> Choice:
        params = sequence.request.params
        return Choice(
            sequence,
            self.tokenizer.detokenizer(prompt=sequence.request.prompt, skip_special_tokens=params.skip_special_tokens),
            StopChecker(params.stop, include_stop_str_in_output=params.include_stop_str_in_output),
            self._eos_ids,
            self.model.max_model_len,
        )


__all__ = ["Engine", "ModelCard", "RequestError", "Ticket"]
