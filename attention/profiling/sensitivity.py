"""How much the model's answers depend on each head: what happens to them when that head alone reads next to nothing."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.search import DENSE, Assignment, Choice

LEAST_ERROR = 1e-6  # squared and relative: below this a head's output did not change
FLOOR = 0.1  # of the mean: no head is taken to matter less, as one that is of no use alone may be in need with others


Place = tuple[Phase, int, int]  # phase, layer, KV head


def probes(shape: tuple[int, int], free: Sequence[int], probe: Mapping[Phase, int]) -> dict[Place, Assignment]:
    """For each phase and head an assignment in which that head alone has the candidate `probe`."""
    layers, heads = shape
    found: dict[Place, Assignment] = {}
    for phase in PHASES:
        for layer in free:
            for head in range(heads):
                one = Choice(probe[phase], 0, False) if phase == "prefill" else Choice(0, probe[phase], False)
                rows = [[DENSE] * heads for _ in range(layers)]
                rows[layer][head] = one
                found[phase, layer, head] = tuple(map(tuple, rows))
    return found


def sensitivities(
    diverged: Callable[[Sequence[Assignment], Phase], Sequence[float]],
    shape: tuple[int, int],
    free: Sequence[int],
    probe: Mapping[Phase, int],
    found: Mapping[Phase, Found],
) -> dict[Phase, Tensor]:
    """diverged: nats from dense under assignments that differ from it in one phase. found: at the length of that
    measurement -> by phase [layers, G] float64: nats for a squared relative error of 1. Layers without a choice have
    0."""
    layers, heads = shape
    nats = {phase: torch.zeros(layers, heads, dtype=torch.float64) for phase in PHASES}
    tried = probes(shape, free, probe)
    for phase in PHASES:
        places = [place for place in tried if place[0] == phase]
        for (_, layer, head), far in zip(places, diverged([tried[p] for p in places], phase), strict=True):
            nats[phase][layer, head] = far
    answer: dict[Phase, Tensor] = {}
    for phase in PHASES:
        error = found[phase].error[probe[phase]].clone()
        error[[layer for layer in range(layers) if layer not in free]] = 0
        per_error = nats[phase] / error.clamp(min=LEAST_ERROR)
        floor = FLOOR * nats[phase].sum() / error.sum().clamp(min=LEAST_ERROR)
        own = torch.where(error > LEAST_ERROR, per_error.clamp(min=float(floor)), floor)
        own[[layer for layer in range(layers) if layer not in free]] = 0
        answer[phase] = own
    return answer
