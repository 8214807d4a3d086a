"""How much work waits, counted where requests come in, so that a full server says so at once."""

from dataclasses import dataclass, field
from threading import Lock

from gossamer.server.engine.request import Overloaded


@dataclass(slots=True)
class QueueLoad:
    """Choices that are not running yet and prompt tokens that are not computed yet. Safe to use from any thread."""

    most_requests: int
    most_tokens: int
    requests: int = 0
    tokens: int = 0
    _lock: Lock = field(default_factory=Lock)

    def enter(self, requests: int, tokens: int) -> None:
        """Count a request of `requests` choices and `tokens` prompt tokens. Raises Overloaded when it does not fit.

        A single request always fits an empty queue, however large it is.
        """
        with self._lock:
            if self.requests and self.requests + requests > self.most_requests:
                raise Overloaded(
                    f"The queue is full ({self.requests} requests wait, at most {self.most_requests} may); try later.",
                    reason="max_num_queued_reqs",
                )
            if self.tokens and self.tokens + tokens > self.most_tokens:
                raise Overloaded(
                    f"The queue is full ({self.tokens} prompt tokens wait, at most {self.most_tokens} may); try later.",
                    reason="max_num_queued_tokens",
                )
            self.requests += requests
            self.tokens += tokens

    def leave(self, requests: int, tokens: int) -> None:
        """Choices started to run, or prompt tokens were computed or given up."""
        with self._lock:
            self.requests -= requests
            self.tokens -= tokens
            assert self.requests >= 0 and self.tokens >= 0
