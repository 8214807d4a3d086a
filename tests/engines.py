"""Real engines for tests: tiny models, the page books audited after every step, events collected."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.attention.policy import AttentionPolicy
from gossamer.server.config import ServerConfig
from gossamer.server.engine.build import assemble, attention_policy
from gossamer.server.engine.engine import Engine, Ticket
from gossamer.server.engine.model import Model, load_model
from gossamer.server.engine.observer import Sheltered
from gossamer.server.engine.quality import Checked
from gossamer.server.engine.records import FirstToken, RequestRecord, StepRecord
from gossamer.server.engine.request import Delta, Event, Request, SamplingParams, Started
from gossamer.server.engine.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny tensors: on a busy machine several threads mostly wait for each other

WAIT = 120.0  # seconds after which a test gives up
_ids = itertools.count()


@dataclass
class Records:
    """What the engine told its observer."""

    steps: list[StepRecord] = field(default_factory=list)
    ended: list[RequestRecord] = field(default_factory=list)
    checks: list[Checked] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # seconds, for first tokens and between tokens

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def first_token(self, record: FirstToken) -> None:
        self.waits.append(record.seconds)

    def inter_token(self, seconds: float) -> None:
        self.waits.append(seconds)

    def finished(self, record: RequestRecord) -> None:
        self.ended.append(record)

    def checked(self, checked: Checked) -> None:
        self.checks.append(checked)


@dataclass
class Answer:
    """The events of one request, as they come."""

    n: int
    ticket: Ticket | None = None
    events: list[Event] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def publish(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Started):
            self.started.set()
        if sum(isinstance(e, Delta) and e.finish_reason is not None for e in self.events) == self.n:
            self.done.set()

    def deltas(self, index: int = 0) -> list[Delta]:
        return [e for e in self.events if isinstance(e, Delta) and e.index == index]

    def tokens(self, index: int = 0) -> list[int]:
        assert self.done.wait(WAIT), "the answer did not end"
        return [token for delta in self.deltas(index) for token in delta.tokens]

    def text(self, index: int = 0) -> str:
        assert self.done.wait(WAIT), "the answer did not end"
        return "".join(delta.text for delta in self.deltas(index))

    def finish(self, index: int = 0) -> Delta:
        assert self.done.wait(WAIT), "the answer did not end"
        return self.deltas(index)[-1]

    @property
    def cached(self) -> int:
        return next(e.cached_tokens for e in self.events if isinstance(e, Started))


class Brake:
    """Lets an engine's forward passes go one by one. While one waits at the brake, the engine stands still: its step is
    planned and its pages are taken, nothing is computed yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._arrived, self._may_go, self._open = threading.Semaphore(0), threading.Semaphore(0), False
        forward = Model.forward

        def braked(model: Model, *inputs: Any) -> torch.Tensor:
            if not self._open:
                self._arrived.release()
                assert self._may_go.acquire(timeout=WAIT)
            return forward(model, *inputs)

        monkeypatch.setattr(Model, "forward", braked)

    def wait(self) -> None:
        """Until a forward pass waits here."""
        assert self._arrived.acquire(timeout=WAIT), "no step began"

    def step(self, count: int = 1) -> None:
        """Let the waiting forward pass go, and wait for the next one."""
        for _ in range(count):
            self._may_go.release()
            self.wait()

    def release(self) -> None:
        """Let everything go from here on."""
        self._open = True
        self._may_go.release()


def records_of(engine: Engine) -> Records:
    """What a test engine has told its observer."""
    sheltered = engine._loop.observer
    assert isinstance(sheltered, Sheltered) and isinstance(sheltered.observer, Records)
    return sheltered.observer


def ask(engine: Engine, prompt: Sequence[int], *, n: int = 1, **params: Any) -> Answer:
    """Submit a greedy request of 16 tokens, unless told otherwise. Request fields and sampling parameters by name."""
    outer = {k: params.pop(k) for k in ("priority", "cache_salt", "point", "prompt_logprobs") if k in params}
    sampling = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **params})
    answer = Answer(n)
    request = Request(id=f"test-{next(_ids)}", prompt=list(prompt), params=sampling, n=n, **outer)
    answer.ticket = engine.submit(request, answer.publish)
    return answer


def make_engine(
    path: Path | str,
    *,
    model: Model | None = None,
    policy: AttentionPolicy | None = None,
    ahead: bool | None = None,
    **config: Any,
) -> tuple[Engine, Records]:
    """An engine that is not started. `ahead`: as for `assemble`. Other keyword arguments are fields of ServerConfig."""
    settings = ServerConfig(
        **{
            "model": str(path),
            "dtype": "float32",
            "device": "cpu",
            "kv_cache_memory": 32 * 2**20,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 128,
            **config,
        }
    )
    tokenizer = Tokenizer.load(settings.model_path)
    model = model or load_tiny(settings)
    records = Records()
    policy = policy or attention_policy(settings, model, lambda line: None)
    engine = assemble(settings, model, tokenizer, policy, records, lambda line: None, audit=True, ahead=ahead)
    return engine, records


def load_tiny(settings: ServerConfig) -> Model:
    return load_model(
        settings.model_path,
        revision=None,
        dtype=settings.dtype,
        device=torch.device("cpu" if settings.device == "auto" else settings.device),
        served_length=None,
        report=lambda line: None,
    )


@contextmanager
def running_engine(path: Path | str, **options: Any) -> Iterator[Engine]:
    """A started engine, whose pools must be whole again at the end, and its clock have run forwards."""
    engine, _ = make_engine(path, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0.0)
        engine.cache.audit()
        assert all(pool.pages_owned == 0 for pool in engine.cache.stats()), "pages are still owned after the end"
        assert min(records_of(engine).waits, default=0.0) >= 0
