"""Keeps an eye on what live checks find: an alarm per operating point, and which point to use in its place."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.second_look import Check, Quality

_log = logging.getLogger(__name__)

WINDOW = 128  # the newest checks of one operating point and phase, which are judged together
LEAST = 32  # checks before anything is judged
REST_SECONDS = 600.0  # that a point is not used after its alarm, where there is a safer one to use


@dataclass(frozen=True, slots=True)
class Checked:
    """A check of live traffic. `quality` is None where nobody can know: the head had given keys back, or numbers were
    not finite."""

    check: Check
    quality: Quality | None

    @property
    def phase(self) -> str:
        return "decode" if self.check.decode else "prefill"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the mean of the newest checks has to hold; None: anything."""

    min_recall: float | None = None
    max_error: float | None = None

    def crossed(self, found: list[Quality]) -> str:
        """In words, and empty where they hold."""
        recall, error = fmean(each.recall for each in found), fmean(each.error for each in found)
        if self.min_recall is not None and recall < self.min_recall:
            return f"mean recall {recall:.3f}, less than --quality-min-recall {self.min_recall:g}"
        if self.max_error is not None and error > self.max_error:
            return f"mean output error {error:.3f}, more than --quality-max-error {self.max_error:g}"
        return ""


class Guard:
    """Judges each operating point by its newest checks. The engine thread notes; any thread may ask.

    With `fall_back`, requests for a point whose bounds were crossed are given the point that its policy names as safer,
    for REST_SECONDS; then it is tried again, and judged by new checks alone. The safest point is never replaced.
    """

    def __init__(
        self,
        bounds: Bounds,
        policy: AttentionPolicy,
        fall_back: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bounds = bounds
        self._safer = policy.safer() if fall_back else {}
        self._clock = clock
        self._names = policy.names
        self._newest: dict[tuple[str, str], deque[Quality]] = {}
        self._crossed: frozenset[tuple[str, str]] = frozenset()  # replaced, never changed: other threads read it
        self._resting: Mapping[str, float] = {}  # until when; likewise

    def note(self, checked: Checked) -> None:
        """One more check was made."""
        if checked.quality is None:
            return
        key = name, phase = checked.check.point, checked.phase
        newest = self._newest.setdefault(key, deque(maxlen=WINDOW))
        newest.append(checked.quality)
        if len(newest) < LEAST:
            return
        why = self._bounds.crossed(list(newest))
        if not why:
            if key in self._crossed:
                _log.warning("quality of %r in %s is within its bounds again", name, phase)
                self._crossed -= {key}
            return
        if key not in self._crossed and name not in self.resting():
            instead = self._safer.get(name)
            then = f"; new requests for it use {instead!r} for {REST_SECONDS / 60:.0f} minutes" if instead else ""
            _log.warning("quality of %r in %s: %s, over the last %d checks%s", name, phase, why, len(newest), then)
            if instead:
                self._resting = {**self._resting, name: self._clock() + REST_SECONDS}
        if name in self._safer:
            newest.clear()  # what comes after the rest is judged alone
        else:
            self._crossed |= {key}

    def resting(self) -> frozenset[str]:
        """Points that new requests are not given now."""
        now = self._clock()
        return frozenset(name for name, until in self._resting.items() if now < until)

    def alarms(self) -> dict[str, bool]:
        """By operating point, whether a bound is crossed, or was and the point rests since."""
        crossed = {name for name, _ in self._crossed} | self.resting()
        return {name: name in crossed for name in self._names}

    def instead_of(self, name: str) -> str:
        """The operating point that a new request for `name` is given."""
        resting = self.resting()
        while name in resting:
            name = self._safer[name]
        return name
