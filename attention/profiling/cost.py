"""What a head costs: seconds of choosing and attending as measured on a device, and bytes of memory."""

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

Goal = Literal["latency", "throughput", "memory"]


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


class PhaseCurves(Strict):
    """All times are for one KV head and one query block (generated: one token).

    attend: against pages read. tokens: what single tokens add, against their number. choose: against the pages that the
    block may see, by kind of candidate.
    """

    attend: Curve
    tokens: Curve
    choose: dict[str, Curve]


class DeviceProfile(Strict):
    """How long the parts of attention take on one device, for heads of one shape."""

    gossamer_device_profile: Literal[1] = 1
    device: str
    dtype: str
    ratio: int
    head_dim: int
    about: dict[str, str]  # versions, threads, date
    prefill: PhaseCurves
    decode: PhaseCurves

    def curves(self, phase: Phase) -> PhaseCurves:
        return self.prefill if phase == "prefill" else self.decode

    def seconds(self, phase: Phase, kind: str, *, seen: float, reads: "Reads") -> float:
        """Of a candidate for a query block that may see `seen` pages; `kind` as in Candidate.kind. Raises
        DeviceProfileError for a kind that was not measured."""
        curves = self.curves(phase)
        attend = curves.attend.at((reads.density - reads.singles) * seen)
        if reads.singles:
            attend += curves.tokens.at(reads.singles * seen * PAGE_SIZE)
        if kind in ("dense", "sink-recent"):  # all layers share their index
            return attend
        if kind not in curves.choose:
            raise DeviceProfileError(
                f"The device profile of {self.device} does not say how long {kind} takes; measure the device anew, "
                "without --device-profile."
            )
        return attend + curves.choose[kind].at(seen)


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


@dataclass(frozen=True, slots=True)
class Weights:
    """What a second of each phase and a byte of memory are worth, each as a share of what dense attention takes."""

    prefill: float
    decode: float
    memory: float

    @classmethod
    def of(cls, goal: Goal, memory: float | None = None) -> "Weights":
        """The goal's own, or with a share of 0 to 1 for memory and the rest split as the goal splits it."""
        prefill, decode, own = {
            "latency": (0.475, 0.475, 0.05),
            "throughput": (0.25, 0.5, 0.25),
            "memory": (0.1, 0.1, 0.8),
        }[goal]
        if memory is None:
            return cls(prefill, decode, own)
        left = (1 - memory) / (prefill + decode)
        return cls(prefill * left, decode * left, memory)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs of heads at the lengths that are profiled, as shares of what all heads cost when dense. heads: how many
    there are; page_bytes: of one head's keys and values."""

    device: DeviceProfile
    weights: Weights
    lengths: tuple[int, ...]
    heads: int
    page_bytes: int

    def of_phase(self, phase: Phase, kind: str, reads: Mapping[int, Reads]) -> float:
        """reads: of a head, by length."""
        weight = self.weights.prefill if phase == "prefill" else self.weights.decode
        shares = [self._share(phase, kind, length, reads[length]) for length in self.lengths]
        return weight * sum(shares) / len(shares) / self.heads

    def of_call(self, phase: Phase, kind: str, sharing: int, layer_heads: int) -> float:
        """What a selector costs beyond what its heads pay for it: a call takes some time however few heads of a layer
        share it, and each of these pays as if all did."""
        if kind in ("dense", "sink-recent"):
            return 0.0
        weight = self.weights.prefill if phase == "prefill" else self.weights.decode
        shares = [self.device.curves(phase).choose[kind].at(0) / self._dense(phase, n) for n in self.lengths]
        return weight * sum(shares) / len(shares) / self.heads * (layer_heads - sharing)

    def of_memory(self, summary_bytes: int, window: tuple[int, int] | None) -> float:
        """window: sink and recent tokens that the head keeps, None for all. summary_bytes: per page."""
        shares = [self.memory_share(summary_bytes, window, length) for length in self.lengths]
        return self.weights.memory * sum(shares) / len(shares) / self.heads

    def memory_share(self, summary_bytes: int, window: tuple[int, int] | None, length: int) -> float:
        """Of one head, against what a dense head keeps of a sequence of this length."""
        kept = length if window is None else min(length, sum(window) + PAGE_SIZE)
        return (1 + summary_bytes / self.page_bytes) * kept / length

    def _share(self, phase: Phase, kind: str, length: int, reads: Reads) -> float:
        return self.device.seconds(phase, kind, seen=_seen(phase, length), reads=reads) / self._dense(phase, length)

    def _dense(self, phase: Phase, length: int) -> float:
        return self.device.seconds(phase, "dense", seen=_seen(phase, length), reads=Reads(1.0))

    def worth_it_above(self, phase: Phase, kind: str, reads: Mapping[int, Reads]) -> int:
        """The length from which a candidate of this kind costs less than dense attention, a power of two; 0 when that
        is so from 1K on. Shorter than the profiled lengths, as many keys are read as at the nearest of these, be the
        budget a count or a share."""
        length = 1024
        while length < max(self.lengths):
            nearest = min(self.lengths, key=lambda each: abs(each - length))
            more = max(1.0, nearest / length)
            own = Reads(min(1.0, reads[nearest].density * more), min(1.0, reads[nearest].singles * more))
            if self._share(phase, kind, length, own) < 1.0:
                break
            length *= 2
        return 0 if length == 1024 else length


def _seen(phase: Phase, length: int) -> float:
    """Pages: a prompt's blocks see half of it on average, a generated token all of it."""
    return length / PAGE_SIZE / (2 if phase == "prefill" else 1)
