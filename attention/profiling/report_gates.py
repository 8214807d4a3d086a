"""Trained gates against the mean keys of pages, head by head, and why a head gains nothing."""

from torch import Tensor

from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.profile import GateRecall, Profile
from gossamer.attention.profiling.report_maps import Scale, heat_map
from gossamer.attention.profiling.report_parts import (
    Gallery,
    Picture,
    Section,
    Table,
    heads_of,
    listed,
    longest,
    number_of,
    percent,
    points,
)

LEVEL = 0.01  # of recall: what differs by less is level
EVEN = 0.5  # a head whose mass takes more than this share of the pages to be found has nothing to choose by
CLOSE = 0.5  # of the mass, at the beginning or near: more than this is read whatever is chosen

Place = tuple[int, int]


def gates_section(profile: Profile) -> Section:
    title = "Learned gates"
    if profile.gates is None:
        return Section("gates", title, ("No gates were trained.",))
    shape, rows, said, gains = profile.shape, [], [], {}
    for phase, recall in profile.gates.items():
        gain = _gain(profile, recall)
        gate, pooled = means(profile, recall)
        better, worse = (sum(sign * each >= LEVEL for each in gain.values()) for sign in (1, -1))
        verdict = "better" if gate > pooled else "not better"
        rows.append((phase, percent(gate), percent(pooled), verdict, f"{better} of {len(gain)}", f"{worse}"))
        said.append(why(profile, phase))
        gains[phase] = [[gain.get((layer, head)) for head in range(shape.kv_heads)] for layer in range(shape.layers)]
    heads = ("heads where it finds 1 point more", "1 point less")
    columns = ("phase", "recall of the gate", "recall of pooled keys", "the gate is", *heads)
    scale = Scale.over(list(gains.values()), _in_points, _in_points)
    pictures = (*(Picture(heat_map(phase, values, scale)) for phase, values in gains.items()), Picture(scale.bar()))
    begin = (
        "Recall of dense attention's mass under the same budgets, of the trained gate and of the mean keys of pages, "
        f"at {longest(profile)} tokens. A gate is taught the largest weight in each page and judged here by all of the "
        "mass that is found: where the two rank pages differently it may find less."
    )
    gallery = Gallery(pictures, "Points of recall that the gate finds more than pooled keys.")
    return Section("gates", title, (begin, *said), (Table(columns, tuple(rows)), gallery))


def means(profile: Profile, recall: GateRecall) -> tuple[float, float]:
    """Of the gate and of pooled keys, over the heads that have a choice."""
    free = list(profile.shape.free)
    return float(recall.gate[free].mean()), float(recall.pooled[free].mean())


def why(profile: Profile, phase: Phase) -> str:
    """What the gate of a phase gains, where, and what the heads are like in which it gains nothing."""
    assert profile.gates is not None
    gain = _gain(profile, profile.gates[phase])
    more, less = (sorted(p for p, each in gain.items() if sign * each >= LEVEL) for sign in (1, -1))
    told = [_most(where, gain, what) for where, what in ((more, "more"), (less, "less")) if where]
    rest = [place for place in gain if place not in more]
    text = f"{phase}: {'; '.join(told) or 'no head gains or loses a point'}."
    if not rest:
        return text
    looks = profile.looks[longest(profile)]
    far = looks.far
    pages: Tensor = looks.pages / looks.queries.clamp(min=1)
    even = [place for place in rest if float(pages[place]) >= EVEN]
    close = [place for place in rest if place not in even and 1 - float(far[place]) >= CLOSE]
    kinds = []
    if even:
        kinds.append(
            f"{len(even)} need more than {percent(EVEN)} of the pages for 90% of their mass, so that any choice finds "
            "little beside its share"
        )
    if close:
        kinds.append(
            f"{len(close)} have more than {percent(CLOSE)} of it at the beginning or near, where every choice reads"
        )
    others = len(rest) - len(even) - len(close)
    if others:
        kinds.append(f"{others} {'has' if others == 1 else 'have'} something to find that pooled keys find as well")
    return f"{text} Of the {number_of(len(rest), 'head')} that gain less than a point, {listed(kinds)}."


def _in_points(gain: float) -> str:
    return points(100 * gain)


def _gain(profile: Profile, recall: GateRecall) -> dict[Place, float]:
    return {place: float(recall.gate[place] - recall.pooled[place]) for place in heads_of(profile)}


def _most(where: list[Place], gain: dict[Place, float], what: str) -> str:
    mean = sum(abs(gain[place]) for place in where) / len(where)
    layer, head = max(where, key=lambda place: abs(gain[place]))
    return (
        f"{number_of(len(where), 'head')} find{'s' if len(where) == 1 else ''} {what}, by {points(100 * mean)} points "
        f"in the mean and {points(100 * abs(gain[layer, head]))} in head {layer}.{head}"
    )
