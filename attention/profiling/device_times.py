"""How long the parts of attention take on a device: the file that `gossamer profile --device-profile` reads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from gossamer.attention.policy_backends import Strict
from gossamer.attention.policy_view import Phase
from gossamer.kernels.layout import PAGE_SIZE

FREE = ("dense", "sink-recent")  # kinds of candidates that choose by position alone: all layers share their index


class DeviceProfileError(Exception):
    """A device profile cannot be used. One sentence that says what to do."""


class Curve(Strict):
    """Seconds against a size, linear between the points that were measured and beyond the last two."""

    points: tuple[tuple[float, float], ...] = Field(min_length=2, strict=False)

    def at(self, size: float) -> float:
        (x0, y0), (x1, y1) = next(
            (pair for pair in pairwise(self.points) if size <= pair[1][0]), (self.points[-2], self.points[-1])
        )
        return max(0.0, y0 + (y1 - y0) * (size - x0) / (x1 - x0))


class Timing(Strict):
    """call: seconds of a call however much it does; each: what one KV head and one query block (generated: one token)
    add, in seconds against a size."""

    call: float = Field(ge=0)
    each: Curve


class PhaseTimes(Strict):
    """dense: reading everything, against the pages that the block may see. attend: reading what was chosen, against
    pages read; called for each group of heads that keep the same tokens. tokens: what single tokens add for one head
    and block, against their number. choose: against the pages that the block may see, by kind of candidate; called for
    each run of neighbouring heads that share a selector."""

    dense: Timing
    attend: Timing
    tokens: Curve
    choose: dict[str, Timing]


class DeviceProfile(Strict):
    """How long the parts of attention take on one device, for heads of one shape."""

    gossamer_device_profile: Literal[1] = 1
    device: str
    dtype: str
    ratio: int
    head_dim: int
    chunk: int = Field(gt=0)  # tokens of a prompt that are computed at once
    about: dict[str, str]  # versions, threads, date
    prefill: PhaseTimes
    decode: PhaseTimes

    def times(self, phase: Phase) -> PhaseTimes:
        return self.prefill if phase == "prefill" else self.decode

    def seconds(self, phase: Phase, kind: str, *, seen: float, reads: "Reads") -> float:
        """Of a candidate for a head and a query block that may see `seen` pages, without calls; `kind` as in
        Candidate.kind. Raises DeviceProfileError for a kind that was not measured."""
        times = self.times(phase)
        if kind == "dense":
            return times.dense.each.at(seen)
        attend = times.attend.each.at((reads.density - reads.singles) * seen)
        if reads.singles:
            attend += times.tokens.at(reads.singles * seen * PAGE_SIZE)
        return attend if kind in FREE else attend + self._choosing(phase, kind).each.at(seen)

    def call(self, phase: Phase, kind: str) -> float:
        """Seconds of one call of such a candidate's selector, however few its heads and blocks."""
        return 0.0 if kind in FREE else self._choosing(phase, kind).call

    def _choosing(self, phase: Phase, kind: str) -> Timing:
        times = self.times(phase)
        if kind not in times.choose:
            raise DeviceProfileError(
                f"The device profile of {self.device} does not say how long {kind} takes; measure the device anew, "
                "without --device-profile."
            )
        return times.choose[kind]


@dataclass(frozen=True, slots=True)
class Reads:
    """The share of what could be read that is read, and the part of it that is read as single tokens."""

    density: float
    singles: float = 0.0


def packaged_devices() -> Mapping[str, Path]:
    """Device profiles that come with Gossamer, by name."""
    folder = Path(str(files("gossamer") / "configs" / "devices"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_device_profile(asked: Path) -> DeviceProfile:
    """A file, or the name of a packaged one. Raises DeviceProfileError."""
    packaged = packaged_devices()
    path = packaged.get(str(asked), asked)
    try:
        return DeviceProfile.model_validate_json(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError, ValueError) as error:
        detail = str(error).splitlines()[0]
        raise DeviceProfileError(
            f"The device profile {path} cannot be used ({detail}); give a file that `gossamer profile` wrote, one of "
            f"{', '.join(packaged) or 'none'}, or leave --device-profile out."
        ) from error


def save_device_profile(profile: DeviceProfile, path: Path) -> None:
    path.write_text(json.dumps(profile.model_dump(mode="json"), indent=1) + "\n", "utf-8")
