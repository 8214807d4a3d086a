"""Who wants to know what happens in the engine, and a shelter: what they do wrong harms no request."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from gossamer.server.engine.quality import Checked
from gossamer.server.engine.records import FirstToken, RequestRecord, StepRecord

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Observer(Protocol):
    """Called on the engine thread."""

    def step(self, record: StepRecord) -> None: ...
    def first_token(self, record: FirstToken) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def finished(self, record: RequestRecord) -> None: ...
    def checked(self, checked: Checked) -> None: ...


@dataclass(slots=True)
class Sheltered:
    """Hands everything on. An exception goes no further, and is logged once for each kind of news."""

    observer: Observer
    _failed: set[str] = field(default_factory=set)

    def step(self, record: StepRecord) -> None:
        self._tell("step", self.observer.step, record)

    def first_token(self, record: FirstToken) -> None:
        self._tell("first token", self.observer.first_token, record)

    def inter_token(self, seconds: float) -> None:
        self._tell("inter-token", self.observer.inter_token, seconds)

    def finished(self, record: RequestRecord) -> None:
        self._tell("finished", self.observer.finished, record)

    def checked(self, checked: Checked) -> None:
        self._tell("checked", self.observer.checked, checked)

    def _tell(self, kind: str, tell: Callable[[T], None], news: T) -> None:
        try:
            tell(news)
        except Exception:
            if kind not in self._failed:
                self._failed.add(kind)
                _log.exception("an observer of the engine failed on %r; its numbers are incomplete from now on", kind)
