"""The real engine in this process, with all operating points of all policies at once."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gossamer.attention.policy import AttentionPolicy, OperatingPoint, dense_policy, within_windows
from gossamer.attention.policy_view import LoadedPolicy
from gossamer.server.config import ServerConfig
from gossamer.server.engine.build import build_engine
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.model import Model
from gossamer.server.engine.request import AttentionUse, Delta, Event, Request, RequestError, SamplingParams, Started
from gossamer.server.eval.question import Answer, EvalError, Likelihood, Passage, Question, Use

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A policy, and which of its points: None for all."""

    loaded: LoadedPolicy
    point: str | None


@dataclass
class _Reply:
    """The events of one request."""

    text: str = ""
    tokens: int = 0
    started: Started | None = None
    last: Delta | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def publish(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Delta):
            self.text += event.text
            self.tokens += len(event.tokens)
            if event.finish_reason is not None:
                self.last = event
                self.done.set()

    def wait(self) -> tuple[Started, Delta]:
        self.done.wait()
        last = self.last
        assert last is not None
        if last.finish_reason in ("error", "abort") or self.started is None:
            raise EvalError(last.message or "The engine gave up a request.")
        return self.started, last


class Local:
    """An engine that runs until `stop`. Raises StartupError or EvalError."""

    baseline = DENSE

    def __init__(
        self, config: ServerConfig, wanted: Sequence[Wanted], longest: int, report: Callable[[str], None]
    ) -> None:
        """longest: tokens of the longest request with its reply."""
        self.dense_too: list[str] = []  # points that are not asked, since they are the baseline

        def choose(model: Model) -> AttentionPolicy:
            if longest > model.shape.max_positions:
                raise EvalError(
                    f"The longest request has {longest} tokens, but this model has {model.shape.max_positions} "
                    "positions; give shorter --lengths."
                )
            return within_windows(together(model, wanted, self.dense_too), model.shape.windows)

        self._engine: Engine = build_engine(config, _Silent(), report, choose)
        self.points = self._engine.all_points
        self._ids = itertools.count()
        self._engine.start()

    def stop(self) -> None:
        self._engine.stop(0.0)

    def ask(self, point: str, questions: Sequence[Question]) -> list[Answer]:
        first = self._submit(point, questions[0])
        first[1].wait()
        replies = [first, *(self._submit(point, question) for question in questions[1:])]
        uses = [_use(length, reply) for length, reply in replies]  # waits for the end
        return [Answer(reply.text, use) for (_, reply), use in zip(replies, uses, strict=True)]

    def read(self, point: str, passage: Passage) -> Likelihood:
        reply = self._send(point, passage.tokens, 1, prompt_logprobs=0)
        started, _ = reply.wait()
        assert started.prompt_logprobs is not None
        found = tuple(each.logprob for each in started.prompt_logprobs[-passage.scored :] if each is not None)
        return Likelihood(found, _use(len(passage.tokens), reply))

    def fingerprints(self) -> dict[str, str]:
        return {point: self._engine.fingerprint_of(point) for point in self.points}

    def _submit(self, point: str, question: Question) -> tuple[int, _Reply]:
        speech = self._engine.tokenizer
        tokens = speech.encode_chat(question.chat) if question.chat else speech.encode(question.prompt)
        return len(tokens), self._send(point, tokens, question.most)

    def _send(self, point: str, tokens: Sequence[int], most: int, prompt_logprobs: int | None = None) -> _Reply:
        reply, params = _Reply(), SamplingParams(max_tokens=most, temperature=0.0)
        request = Request(
            id=f"eval-{next(self._ids)}", prompt=tokens, params=params, point=point, prompt_logprobs=prompt_logprobs
        )
        try:
            self._engine.submit(request, reply.publish)
        except RequestError as error:
            raise EvalError(str(error)) from error
        return reply


def together(model: Model, wanted: Sequence[Wanted], dense_too: list[str]) -> AttentionPolicy:
    """Dense, and then every point that was asked for, as "policy:point". One that is dense is the baseline already:
    `dense_too` gets its name. Raises EvalError for two of one name that differ."""
    shape = model.shape
    dense = OperatingPoint(DENSE, dense_policy(shape.layers, shape.kv_heads).points[0].heads)
    points = {DENSE: dense}
    for each in wanted:
        policy = each.loaded.policy
        for point in policy.points:
            name = f"{policy.name}:{point.name}"
            if each.point not in (None, point.name):
                continue
            if point.fingerprint() == dense.fingerprint():
                dense_too.append(name)
            elif points.setdefault(name, OperatingPoint(name, point.heads)).fingerprint() != point.fingerprint():
                raise EvalError(
                    f"Two policies are called {policy.name!r} and differ at {point.name!r}; change the name in one."
                )
    return AttentionPolicy("eval", tuple(points.values()))


def _use(prompt: int, reply: _Reply) -> Use:
    started, last = reply.wait()
    read = last.attention
    return Use(prompt, started.cached_tokens, reply.tokens, *((None, None) if read is None else _densities(read)))


def _densities(read: AttentionUse) -> tuple[float | None, float | None]:
    """As the HTTP API says them."""
    pairs = (read.prefill_read, read.prefill_possible), (read.decode_read, read.decode_possible)
    prefill, decode = (round(min(1.0, part / whole), 4) if whole else None for part, whole in pairs)
    return prefill, decode


class _Silent:
    """An observer that keeps nothing."""

    def step(self, record: object) -> None: ...
    def first_token(self, record: object) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def finished(self, record: object) -> None: ...
    def checked(self, checked: object) -> None: ...
