"""Measures what attention costs on this device: the micro-benchmark behind a device profile."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from random import Random
from statistics import median
from typing import Any, TypeVar

import torch

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.device_times import FREE, Curve, DeviceProfile, PhaseTimes, Timing
from gossamer.attention.profiling.noise import Layer, attending, choosing, noise_layers
from gossamer.attention.profiling.reading import Shape
from gossamer.kernels.layout import PAGE_SIZE

READ = (2, 8, 32, 128)  # pages per block whose reading is timed
TOKENS = (64, 512, 2048)
WARM, ROUNDS = 1, 15
K = TypeVar("K")
Work = Callable[[Layer], Callable[[], None]]
Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # what a call does -> what does it again


@dataclass(frozen=True, slots=True)
class DeviceBench:
    """Times attention for heads of one shape, over noise. chunk: tokens of a prompt that are computed at once. record:
    for devices where the server records steps of generated tokens and replays them."""

    shape: Shape
    artefacts: Artefacts
    lengths: Sequence[int]  # of sequences, two or more
    chunk: int
    report: Callable[[str], None]
    record: Record | None = None

    def measure(self, candidates: Mapping[Phase, Sequence[Candidate]]) -> DeviceProfile:
        """One candidate of each kind is timed."""
        return DeviceProfile(
            device=device_name(self.shape.device),
            dtype=str(self.shape.dtype).removeprefix("torch."),
            ratio=self.shape.ratio,
            head_dim=self.shape.head_dim,
            chunk=self.chunk,
            about={
                "torch": torch.__version__,
                "threads": str(torch.get_num_threads()),
                "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
            },
            prefill=self._phase("prefill", candidates["prefill"]),
            decode=self._phase("decode", candidates["decode"]),
        )

    def _phase(self, phase: Phase, candidates: Sequence[Candidate]) -> PhaseTimes:
        kinds = {each.kind: each.selector(self.shape.free[0], self.shape, self.artefacts) for each in candidates}
        works: dict[str, Work] = {
            kind: partial(choosing, selector=selector) for kind, selector in kinds.items() if kind not in FREE
        }
        dense: list[tuple[float, _Pair]] = []
        choose: dict[str, list[tuple[float, _Pair]]] = {kind: [] for kind in works}
        for length in sorted(self.lengths):
            known = [summary for each in kinds.values() for summary in each.summaries]
            layers, pages = noise_layers(self.shape, phase, length, self.chunk, known), length // PAGE_SIZE
            self.report(f"{phase}: dense attention, and {len(works)} ways of choosing, at {length} tokens")
            found = self._times(layers, {**works, "dense": partial(attending, read=pages)})
            dense.append((pages, found.pop("dense")))
            for kind, pair in found.items():
                choose[kind].append((pages, pair))
        self.report(f"{phase}: attention to what was chosen")
        few = {read: partial(attending, read=read) for read in READ if read < pages}
        return PhaseTimes(
            dense=_timing(dense),
            attend=_timing(list(self._times(layers, few).items())),
            tokens=self._tokens(layers),
            choose={kind: _timing(own) for kind, own in choose.items()},
        )

    def _tokens(self, layers: Sequence[Layer]) -> Curve:
        """What single tokens add to one page, for one head and block."""
        most = (layers[-1].kv.table.shape[1] - 1) * PAGE_SIZE
        works = {count: partial(attending, read=1, tokens=count) for count in (0, *(min(n, most) for n in TOKENS))}
        found = self._times(layers[-1:], works)
        alone = found[0].many
        return Curve(points=tuple((float(n), max(0.0, own.many - alone) / own.shares[1]) for n, own in found.items()))

    def _times(self, layers: Sequence[Layer], works: Mapping[K, Work]) -> dict[K, "_Pair"]:
        """Medians of some rounds, each of all works in another order, so that what disturbs one disturbs all."""
        calls = {(name, n): self._call(work, layer) for name, work in works.items() for n, layer in enumerate(layers)}
        taken: dict[tuple[K, int], list[float]] = {key: [] for key in calls}
        rng, order = Random(0), list(calls)
        for _ in range(WARM + ROUNDS):
            rng.shuffle(order)
            for key in order:
                began = _now(self.shape.device)
                calls[key]()
                taken[key].append(_now(self.shape.device) - began)
        last, shares = len(layers) - 1, (layers[0].shares, layers[-1].shares)
        return {name: _Pair(median(taken[name, 0][WARM:]), median(taken[name, last][WARM:]), shares) for name in works}

    def _call(self, work: Work, layer: Layer) -> Callable[[], None]:
        """As the server does it."""
        call = work(layer)
        if self.record is None or layer.blocks.size > 1:
            return call
        try:
            return self.record(call)[0]
        except RuntimeError:  # what decides on the host cannot be recorded, and is run as it is
            return call


@dataclass(frozen=True, slots=True)
class _Pair:
    """Seconds for few and for many shares: blocks times KV heads."""

    few: float
    many: float
    shares: tuple[int, int]

    @property
    def call(self) -> float:
        """What is left when there is nothing to share."""
        few, many = self.shares
        return max(0.0, (self.few * many - self.many * few) / (many - few))


def _timing(measured: Sequence[tuple[float, _Pair]]) -> Timing:
    """Against sizes. One call for all of them, the least that was found; the rest is what blocks add."""
    call = min(pair.call for _, pair in measured)
    points = tuple((float(size), max(0.0, pair.many - call) / pair.shares[1]) for size, pair in measured)
    return Timing(call=call, each=Curve(points=points))


def device_name(device: torch.device) -> str:
    """As people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
