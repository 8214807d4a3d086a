"""A finished profile made by hand, for tests of what is done with one: nothing was measured."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from gossamer.attention.policy_file import ModelEntry, Provenance
from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.candidates import Candidate, ladder
from gossamer.attention.profiling.cost import Weights
from gossamer.attention.profiling.device_times import Curve, DeviceProfile, PhaseTimes, Timing
from gossamer.attention.profiling.fidelity import Score, Trial
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.options import Assignment, Choice
from gossamer.attention.profiling.profile import Attempt, Bound, Point, Profile, Rival, Settings, Spent
from gossamer.attention.profiling.reading import Shape
from gossamer.attention.profiling.search import Plan
from gossamer.attention.profiling.statistics import Looks
from gossamer.attention.profiling.writing import policy_file
from gossamer.attention.reads import SpanReads

LENGTHS = (1024, 2048)
BALANCED, FAST = Bound("balanced", 1.0, 0.02), Bound("fast", 4.0, 0.1)
ASKED = 40  # answers of each task and length


def trial(divergence: float, *, single: int = 36, pairs: int = 30, lengths: tuple[int, ...] = LENGTHS) -> Trial:
    """Right answers of ASKED, of two tasks; the divergence of every text."""
    scores = []
    for length in lengths:
        for task, right in (("single", single), ("pairs", pairs)):
            scores += [Score(task, length, divergence, 0.97, int(n < right), 1) for n in range(ASKED)]
        scores += [Score("text", length, divergence, 0.9, 0, 0)] * 2
    return Trial(tuple(scores), {length: SpanReads(30.0, 100.0, 20.0, 80.0) for length in lengths})


def profile(
    layers: int = 2,
    kv_heads: int = 2,
    *,
    windows: tuple[int, ...] = (),
    name: str = "tiny",
    unseen: Mapping[str, Trial] | None = None,
) -> Profile:
    """balanced and fast give heads one candidate after another; a head in three streams. windows: layers with one of
    their own. unseen: how operating points do on unseen documents, by name."""
    entry = ModelEntry(name=name, model_type="llama", layers=layers, kv_heads=kv_heads, query_heads=2 * kv_heads)
    own = tuple(512 if layer in windows else None for layer in range(layers))
    shape = Shape(layers, 2 * kv_heads, kv_heads, 32, torch.bfloat16, torch.device("cpu"), own)
    candidates: dict[Phase, tuple[Candidate, ...]] = {
        phase: ladder(phase, labels="tiny-labels.safetensors", gates=None) for phase in PHASES
    }
    generator = torch.Generator().manual_seed(0)
    found = {p: {n: _found(len(own), layers, kv_heads, generator) for n in LENGTHS} for p, own in candidates.items()}
    sensitivity = {p: torch.rand(layers, kv_heads, generator=generator, dtype=torch.float64) / 10 for p in PHASES}

    def plan(heads: Assignment, cost: float) -> Plan:
        nats = 0.0
        for layer in shape.free:
            for head, choice in enumerate(heads[layer]):
                for p in PHASES:
                    worst = max(float(found[p][n].error[getattr(choice, p), layer, head]) for n in LENGTHS)
                    nats += float(sensitivity[p][layer, head]) * worst
        return Plan(heads, cost, nats)

    plans = {
        "exact": plan(_heads(shape, 0), 1.0),
        "balanced": plan(_heads(shape, 1), 0.431),
        "fast": plan(_heads(shape, 3), 0.217),
    }
    trials = {"exact": trial(0.0), "balanced": trial(0.0123), "fast": trial(0.0789, pairs=29)}
    bounds = {"exact": None, "balanced": BALANCED, "fast": FAST}
    points = tuple(
        Point(
            point,
            bounds[point],
            each,
            trials[point],
            {**trials, **(unseen or {})}[point],
            {p: dict.fromkeys(LENGTHS, 1.0 if point == "exact" else 0.3137) for p in PHASES},
            dict.fromkeys(LENGTHS, 1.0 if point == "exact" else 0.6173),
        )
        for point, each in plans.items()
    )
    attempts = tuple(
        Attempt(point, plans[point].divergence * 2, replace(plans[point], cost=cost), nats, 0.0, held)
        for point, cost, nats, held in (
            ("balanced", 0.2, 0.3, False),
            ("balanced", 0.431, 0.0123, True),
            ("fast", 0.217, 0.0789, True),
            ("fast", 0.1, 0.9, False),
        )
    )
    rivals = (
        Rival("sink-recent (sink 64, recent 512)", "prefill", plans["fast"], 0.3141, trial(0.4)),
        Rival("block-sparse (score bounds)", "decode", plans["fast"], 0.3, trial(0.001)),
        Rival("block-sparse (score mean)", "decode", plans["fast"], 0.7, trial(0.001)),
    )
    provenance = Provenance(source="profiled", note="by hand")
    heads = {point: plans[point].heads for point in ("balanced", "fast", "exact")}
    return Profile(
        file=policy_file("tiny", entry, provenance, heads, candidates, {p: {} for p in PHASES}),
        model=entry,
        shape=shape,
        settings=Settings(LENGTHS, 2, 4, 0, "latency", None, (BALANCED, FAST), True, False, False),
        weights=Weights.of("latency"),
        device=_device(candidates),
        candidates=candidates,
        above={p: {} for p in PHASES},
        found=found,
        looks={n: _looks(shape, n, generator) for n in LENGTHS},
        sensitivity=sensitivity,
        attempts=attempts,
        points=points,
        rivals=rivals,
        alphas=None,
        gates=None,
        spent=(Spent("calibration at 1024 tokens", 12.0, 2**30), Spent("search", 200.0, 3 * 2**29)),
        about={"commit": "0123abc", "torch": "2.13.0"},
    )


def _heads(shape: Shape, step: int) -> Assignment:
    def choice(place: int) -> Choice:
        return Choice(1, 1, True) if place % 3 == 0 else Choice(8 + place % 5 * step, 9 + place % 4 * step, False)

    dense = (Choice(0, 0, False),) * shape.kv_heads
    return tuple(
        tuple(choice(layer * shape.kv_heads + head) for head in range(shape.kv_heads))
        if step and layer in shape.free
        else dense
        for layer in range(shape.layers)
    )


def _found(candidates: int, layers: int, kv_heads: int, generator: torch.Generator) -> Found:
    """The first candidate is dense."""
    error, recall, density, spread = (
        torch.rand(candidates, layers, kv_heads, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    error[0], spread[0], density[0], recall[0] = 0, 0, 1, 1
    return Found(error / 10, recall, density, torch.zeros_like(density), spread / 100)


def _looks(shape: Shape, length: int, generator: torch.Generator) -> Looks:
    empty = Looks.empty(shape, length)
    mass = torch.rand(empty.distance.shape, generator=generator, dtype=torch.float64)
    mass = 10 * mass / mass.sum(-1, keepdim=True)
    return Looks(empty.queries + 10, mass, mass[..., 0] / 2, mass[..., 1] / 2, mass[..., 2])


def _device(candidates: Mapping[Phase, tuple[Candidate, ...]]) -> DeviceProfile:
    curve = Curve(points=((1.0, 1e-6), (8.0, 4e-6)))
    timing = Timing(call=1e-6, each=curve)
    curves = {
        phase: PhaseTimes(dense=timing, attend=timing, tokens=curve, choose={each.kind: timing for each in own})
        for phase, own in candidates.items()
    }
    about = {"torch": "2.13.0"}
    return DeviceProfile(
        device="a made-up CPU",
        dtype="bfloat16",
        ratio=2,
        head_dim=32,
        chunk=2048,
        about=about,
        prefill=curves["prefill"],
        decode=curves["decode"],
    )
