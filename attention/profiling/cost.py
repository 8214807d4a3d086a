"""What a head costs: seconds of choosing and attending as measured on a device, and bytes of memory, as shares of what
dense attention takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.device_times import DeviceProfile, Reads
from gossamer.attention.step import TILE_ROWS
from gossamer.kernels.layout import PAGE_SIZE

Goal = Literal["latency", "throughput", "memory"]
SEQUENCES: Mapping[Goal, int] = {"latency": 1, "throughput": 16, "memory": 16}  # that decode together


@dataclass(frozen=True, slots=True)
class Weights:
    """What a second of each phase and a byte of memory are worth, each as a share of what dense attention takes, and
    how many sequences decode together."""

    prefill: float
    decode: float
    memory: float
    sequences: int

    @classmethod
    def of(cls, goal: Goal, memory: float | None = None) -> "Weights":
        """The goal's own, or with a share of 0 to 1 for memory and the rest split as the goal splits it."""
        prefill, decode, own = {
            "latency": (0.475, 0.475, 0.05),
            "throughput": (0.25, 0.5, 0.25),
            "memory": (0.1, 0.1, 0.8),
        }[goal]
        if memory is None:
            return cls(prefill, decode, own, SEQUENCES[goal])
        left = (1 - memory) / (prefill + decode)
        return cls(prefill * left, decode * left, memory, SEQUENCES[goal])


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs at the lengths that are profiled, as shares of what all heads cost when dense. page_bytes: of one head's
    keys and values. above: by phase and kind, the length up to which a candidate leaves a head dense."""

    device: DeviceProfile
    weights: Weights
    lengths: tuple[int, ...]
    layers: int
    kv_heads: int
    page_bytes: int
    above: Mapping[Phase, Mapping[str, int]] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Of all layers."""
        return self.layers * self.kv_heads

    def acts(self, phase: Phase, kind: str, length: int) -> bool:
        """Whether a candidate of this kind does anything at that length."""
        return length > self.above.get(phase, {}).get(kind, 0)

    def of_phase(self, phase: Phase, kind: str, reads: Mapping[int, Reads]) -> float:
        """What a head costs, calls left out. reads: of it, by length."""
        seconds = {}
        for length, own in reads.items():
            what = (kind, own) if self.acts(phase, kind, length) else ("dense", Reads(1.0))
            seconds[length] = self._seconds(phase, what[0], length, what[1])
        return self._weighed(phase, seconds)

    def of_calls(self, phase: Phase, groups: Iterable[Sequence[str]]) -> float:
        """What the calls of a layer cost, which all blocks of a step pay for together. groups: heads that keep the same
        tokens, as the kinds of their selectors, neighbours that share one counted once."""
        times, seconds = self.device.times(phase), dict.fromkeys(self.lengths, 0.0)
        for kinds, length in product(groups, self.lengths):
            acting = [kind for kind in kinds if kind != "dense" and self.acts(phase, kind, length)]
            taken = (times.attend if acting else times.dense).call
            taken += sum(self.device.call(phase, kind) for kind in acting)
            seconds[length] += taken / self._together(phase)
        return self._weighed(phase, seconds)

    def of_memory(self, summary_bytes: int, window: tuple[int, int] | None) -> float:
        """window: sink and recent tokens that the head keeps, None for all. summary_bytes: per page."""
        shares = [self.memory_share(summary_bytes, window, length) for length in self.lengths]
        return self.weights.memory * sum(shares) / len(shares) / self.heads

    def memory_share(self, summary_bytes: int, window: tuple[int, int] | None, length: int) -> float:
        """Of one head, against what a dense head keeps of a sequence of this length."""
        kept = length if window is None else min(length, sum(window) + PAGE_SIZE)
        return (1 + summary_bytes / self.page_bytes) * kept / length

    def worth_it_above(self, phase: Phase, kind: str, reads: Mapping[int, Reads]) -> int:
        """The length from which a candidate of this kind costs less than dense attention when all heads of a layer
        share its calls, a power of two; 0 when that is so from 1K on. Shorter than the profiled lengths, as many keys
        are read as at the nearest of these, be the budget a count or a share."""
        times = self.device.times(phase)
        calls = (self.device.call(phase, kind) + times.attend.call) / self._together(phase) / self.kv_heads
        length = 1024
        while length < max(self.lengths):
            nearest = min(self.lengths, key=lambda each: abs(each - length))
            more = max(1.0, nearest / length)
            own = Reads(min(1.0, reads[nearest].density * more), min(1.0, reads[nearest].singles * more))
            if self._seconds(phase, kind, length, own) + calls < self._dense(phase, length):
                break
            length *= 2
        return 0 if length == 1024 else length

    def _weighed(self, phase: Phase, seconds: Mapping[int, float]) -> float:
        """seconds: for a query block, by length."""
        weight = self.weights.prefill if phase == "prefill" else self.weights.decode
        shares = [seconds[length] / self._dense(phase, length) for length in self.lengths]
        return weight * sum(shares) / len(shares) / self.heads

    def _seconds(self, phase: Phase, kind: str, length: int, reads: Reads) -> float:
        return self.device.seconds(phase, kind, seen=_seen(phase, length), reads=reads)

    def _dense(self, phase: Phase, length: int) -> float:
        """Of one head and block in a layer of which all are dense, with its part of the call."""
        call = self.device.times(phase).dense.call / self._together(phase) / self.kv_heads
        return self._seconds(phase, "dense", length, Reads(1.0)) + call

    def _together(self, phase: Phase) -> int:
        """Query blocks that a call is made for."""
        tile = max(1, TILE_ROWS // self.device.ratio)
        return max(1, self.device.chunk // tile) if phase == "prefill" else self.weights.sequences


def _seen(phase: Phase, length: int) -> float:
    """Pages: a prompt's blocks see half of it on average, a generated token all of it."""
    return length / PAGE_SIZE / (2 if phase == "prefill" else 1)
