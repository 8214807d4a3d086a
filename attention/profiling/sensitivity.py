"""How much the model's answers depend on each head: what happens to them when that head alone reads next to nothing."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.options import DENSE, Assignment, Choice

LEAST_ERROR = 1e-6  # squared and relative: below this a head's output did not change
FLOOR = 0.1  # of the mean: no head is taken to matter less, as one that is of no use alone may be in need with others
GROWN = 3.0  # times the squared error of a probe at one length, from which it says little about another
MOST_AGAIN = 8  # heads of a phase that are probed again there

Place = tuple[Phase, int, int]  # phase, layer, KV head
Diverged = Callable[[Sequence[Assignment], Phase], Sequence[float]]
"""Nats from dense under assignments that differ from it in one phase."""


def sensitivities(
    diverged: Diverged,
    shape: tuple[int, int],
    free: Sequence[int],
    probe: Mapping[Phase, int],
    found: Mapping[Phase, Found],
) -> dict[Phase, Tensor]:
    """Every head of the layers that are `free` is made to read next to nothing, by the candidate `probe`. found: at the
    length where `diverged` measures -> by phase [layers, G] float64: nats for a squared relative error of 1. Layers
    without a choice have 0."""
    layers, heads = shape
    places: list[Place] = [(phase, layer, head) for phase in PHASES for layer in free for head in range(heads)]
    nats = _nats(diverged, shape, places, probe)
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


def probed_again(
    known: Mapping[Phase, Tensor],
    diverged: Diverged,
    probe: Mapping[Phase, int],
    found: Mapping[Phase, Found],
    longer: Mapping[Phase, Found],
) -> dict[Phase, Tensor]:
    """`known`, measured where `found` was, with the heads measured anew at another length for which that said little:
    what they look at begins further away. `diverged` and `longer` are of that length."""
    places: list[Place] = []
    for phase in PHASES:
        before, after = (table[phase].error[probe[phase]] for table in (found, longer))
        grown = (known[phase] > 0) & (after > GROWN * before.clamp(min=LEAST_ERROR))
        matter = torch.where(grown, after / before.clamp(min=LEAST_ERROR), 0.0)
        order = matter.flatten().argsort(descending=True, stable=True)[: min(MOST_AGAIN, int(grown.sum()))]
        places += [(phase, *divmod(int(at), before.shape[1])) for at in order]
    layers, heads = known["prefill"].shape
    nats = _nats(diverged, (layers, heads), places, probe)
    answer = {phase: own.clone() for phase, own in known.items()}
    for phase, layer, head in places:
        per_error = float(nats[phase][layer, head] / longer[phase].error[probe[phase]][layer, head])
        answer[phase][layer, head] = max(per_error, float(known[phase][layer, head]))
    return answer


def _nats(
    diverged: Diverged, shape: tuple[int, int], places: Iterable[Place], probe: Mapping[Phase, int]
) -> dict[Phase, Tensor]:
    """By phase [layers, G], 0 where nothing is asked."""
    nats = {phase: torch.zeros(shape, dtype=torch.float64) for phase in PHASES}
    for phase in PHASES:
        own = [place for place in places if place[0] == phase]
        if own:
            for (_, layer, head), far in zip(own, diverged([_alone(shape, p, probe) for p in own], phase), strict=True):
                nats[phase][layer, head] = far
    return nats


def _alone(shape: tuple[int, int], place: Place, probe: Mapping[Phase, int]) -> Assignment:
    """That head alone has the candidate `probe`, in that phase."""
    (layers, heads), (phase, layer, head) = shape, place
    rows = [[DENSE] * heads for _ in range(layers)]
    rows[layer][head] = Choice(probe[phase], 0, False) if phase == "prefill" else Choice(0, probe[phase], False)
    return tuple(map(tuple, rows))
