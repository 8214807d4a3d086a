"""A small engine for tests of the API: it answers with the prompt's own text, one character per token.

Prompts may hold marks that make it behave: see `MARKS`.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gossamer import __version__
from gossamer.server.engine.records import EngineStats, Health, RuleStats
from gossamer.server.engine.request import (
    Delta,
    Event,
    FinishReason,
    InvalidRequest,
    Overloaded,
    Progress,
    Request,
    RequestError,
    Started,
    TokenLogprob,
)

VOCABULARY = 0x110000 + 16  # all of Unicode, then special tokens
BOS, EOS, START, END = range(0x110000, 0x110004)
SPECIAL = {BOS: "<bos>", EOS: "<eos>", START: "<|start|>", END: "<|end|>"}
CONTEXT = 2048
MARKS = {
    "[silent]": "never starts",
    "[stall]": "starts, sends one token, then nothing",
    "[fail]": "sends one token, then an error",
    "[abort]": "gives the request up",
    "[full]": "is refused: the queue is full",
    "[boom]": "raises what nobody expects",
    "[flood]": "sends tokens as fast as it can, to max_tokens",
    "[slow]": "sends a token every 50 ms",
}


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    name: str = "fake"
    names: tuple[str, ...] = ("fake", "org/fake-2")
    max_model_len: int = CONTEXT
    vocab_size: int = VOCABULARY
    created: int = 1_700_000_000
    root: str = "fake"
    default_sampling: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"temperature": 0.5}))


class FakeTokenizer:
    """A token is a character. The chat template is fixed."""

    vocab_size = VOCABULARY
    has_chat_template = True

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + [ord(c) for c in text]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise InvalidRequest("The first message must not be the assistant's.", param="messages")
        ids = [BOS]
        for message in messages:
            ids += [START, *(ord(c) for c in f"{message['role']}:{message['content']}"), END]
        if continue_final_message:
            ids.pop()
        return ids + [START] * add_generation_prompt

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        shown = (i for i in ids if not (skip_special_tokens and i in SPECIAL))
        return "".join(SPECIAL.get(i) or chr(i) for i in shown)

    def token_bytes(self, token: int) -> bytes:
        return (SPECIAL.get(token) or chr(token)).encode("utf-8", "surrogatepass")

    def info(self) -> Mapping[str, Any]:
        names = {"tokenizer_class": "Fake", "bos_token": "<bos>", "eos_token": "<eos>"}
        return {**names, "model_max_length": 10**30, "chat_template": "{{ enable_thinking }}"}


class FakeTicket:
    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    def __init__(self) -> None:
        self.model = FakeModel()
        self.tokenizer = FakeTokenizer()
        self.fingerprint = f"gossamer-{__version__}-dense@exact-00000000"
        self.points = ("exact", "fast")
        self.all_points = ("exact", "fast", "private")
        self.default_point = "exact"
        self.state = Health(alive=True, ready=True)
        self.requests: list[Request] = []
        self.tickets: list[FakeTicket] = []
        self.open = 0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None: ...

    def stop(self, drain_seconds: float) -> None:
        for ticket in self.tickets:
            ticket.cancel()
        for thread in self._threads:
            thread.join(10)

    def fingerprint_of(self, point: str | None) -> str:
        return self.fingerprint if point in (None, "exact") else f"gossamer-{__version__}-dense@{point}-11111111"

    def health(self) -> Health:
        return self.state

    def stats(self) -> EngineStats:
        rule = RuleStats(rule="all", pages=100, pages_owned=7, pages_cached=3, bytes_per_page=4096)
        recent = RuleStats(rule="sink64+recent256", pages=50, pages_owned=5, pages_cached=0, bytes_per_page=4096)
        return EngineStats(
            running=self.open,
            waiting=2,
            pending_prefill_tokens=11,
            kv_usage=0.25,
            kv_token_capacity=6400,
            kv_dtype="bfloat16",
            prefix_queried_tokens=200,
            prefix_hit_tokens=50,
            preemptions=1,
            rules=(rule, recent),
            heartbeat_age=0.0,
            alarms={"exact": False, "fast": True},
        )

    def submit(self, request: Request, publish: Callable[[Event], None]) -> FakeTicket:
        text = self.tokenizer.decode(request.prompt)
        if "[full]" in text:
            raise Overloaded("The queue is full; try again later.", reason="max_num_queued_reqs", retry_after=1)
        if "[boom]" in text:
            raise RuntimeError("secret detail at /somewhere/private")
        if len(request.prompt) + request.params.max_tokens > self.model.max_model_len:
            raise InvalidRequest("Too long.", param="prompt", code="context_length_exceeded")
        request.params.check_vocabulary(self.model.vocab_size)
        ticket = FakeTicket(request.id)
        self.requests.append(request)
        self.tickets.append(ticket)
        thread = threading.Thread(target=self._run, args=(request, text, ticket, publish), daemon=True)
        self._threads.append(thread)
        with self._lock:
            self.open += 1
        thread.start()
        return ticket

    def _run(self, request: Request, text: str, ticket: FakeTicket, publish: Callable[[Event], None]) -> None:
        try:
            publish(Progress(computed=1, total=len(request.prompt)))
            if "[silent]" in text:
                ticket.cancelled.wait(600)
                return
            publish(Started(cached_tokens=1, prompt_logprobs=self._prompt_logprobs(request)))
            for step in range(max(1, request.params.max_tokens)):
                for index in range(request.n):
                    if ticket.cancelled.is_set():
                        return
                    self._step(request, text, index, step, publish)
                if self._pause(text, ticket, step) or self._ends(request, step) is not None:
                    return
        finally:
            with self._lock:
                self.open -= 1

    def _pause(self, text: str, ticket: FakeTicket, step: int) -> bool:
        if "[stall]" in text:
            ticket.cancelled.wait(600)
        if "[slow]" in text:
            ticket.cancelled.wait(0.05)
        return "[fail]" in text or "[abort]" in text

    def _ends(self, request: Request, step: int) -> FinishReason | None:
        params = request.params
        if step + 1 >= params.max_tokens:
            return "length"
        return "stop" if answer(step) in params.stop else None

    def _step(self, request: Request, text: str, index: int, step: int, publish: Callable[[Event], None]) -> None:
        if "[fail]" in text or "[abort]" in text:
            reason: FinishReason = "error" if "[fail]" in text else "abort"
            publish(Delta(index=index, text="a", tokens=(97,)))
            publish(Delta(index=index, text="", tokens=(), finish_reason=reason, message="The engine gave up."))
            return
        character, ends = answer(step), self._ends(request, step)
        stop = character if ends == "stop" else None
        if request.params.max_tokens == 0:
            publish(Delta(index=index, text="", tokens=(), finish_reason="length"))
            return
        logprobs = () if request.params.logprobs is None else (self._logprob(ord(character), request.params.logprobs),)
        publish(
            Delta(
                index=index,
                text="" if stop else character,
                tokens=(ord(character),),
                logprobs=logprobs,
                finish_reason=ends,
                stop_reason=stop,
            )
        )

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        others = [(token, -0.1), *((ord("A") + i, -2.0 - i) for i in range(top))]
        return TokenLogprob(token=token, logprob=-0.1, top=tuple(others[:top]))

    def _prompt_logprobs(self, request: Request) -> tuple[TokenLogprob | None, ...] | None:
        if request.prompt_logprobs is None:
            return None
        return (None, *(self._logprob(token, request.prompt_logprobs) for token in request.prompt[1:]))

    def settled(self, seconds: float = 60.0) -> bool:
        """Every request has ended or been cancelled."""
        end = time.monotonic() + seconds
        while self.open and time.monotonic() < end:
            time.sleep(0.01)
        return self.open == 0


def answer(step: int) -> str:
    """The character that step number `step` generates."""
    return "Hé€😀 wörld. "[step % 12]


__all__ = ["BOS", "CONTEXT", "MARKS", "VOCABULARY", "FakeEngine", "RequestError", "answer"]
