"""Which heads stream, and whether where they look, and alphas that were trained, agree."""

import math
from collections.abc import Sequence

import torch

from gossamer.attention.profiling.heads import agreement
from gossamer.attention.profiling.profile import Profile
from gossamer.attention.profiling.report_charts import Mark, linear, scatter
from gossamer.attention.profiling.report_maps import Scale, heat_map
from gossamer.attention.profiling.report_parts import (
    Gallery,
    Part,
    Picture,
    Section,
    Table,
    default_point,
    heads_of,
    longest,
    number_of,
    percent,
    sparse,
)

HALF = 0.5  # of the heads, as many as DuoAttention lets stream


def streaming_section(profile: Profile) -> Section:
    length, places = longest(profile), list(heads_of(profile))
    far = profile.looks[length].far
    known = {place: float(far[place]) for place in places}
    said = [
        f"Far mass is what a head's attention gives, at {length} tokens, to what is neither at the beginning of the "
        "text nor near: what a streaming head would lose. Heads that stream should have little of it.",
    ]
    rows = []
    for point in sparse(profile):
        flows = [place for place in places if point.plan.heads[place[0]][place[1]].streams]
        others = [place for place in places if place not in set(flows)]
        own = [_mean([known[place] for place in each]) for each in (flows, others)]
        alphas: list[str] = []
        if profile.alphas is not None:
            alpha = profile.alphas
            alphas = [_mean([float(alpha[place]) for place in each]) for each in (flows, others)]
        rows.append((point.name, f"{len(flows)} of {len(places)}", *own, *alphas))
    columns = ["operating point", "heads that stream", "far mass of these", "of the others"]
    if profile.alphas is not None:
        columns += ["alpha of these", "of the others"]
    parts: list[Part] = [Table(tuple(columns), tuple(rows))] if rows else []
    shape = profile.shape
    grids = {"far mass": far} | ({} if profile.alphas is None else {"alpha": profile.alphas})
    tables = {
        name: [
            [float(grid[layer, head]) if layer in shape.free else None for head in range(shape.kv_heads)]
            for layer in range(shape.layers)
        ]
        for name, grid in grids.items()
    }
    scale = Scale.over(list(tables.values()), percent, lambda share: f"{100 * share:.0f}")
    pictures = [*(Picture(heat_map(name, values, scale)) for name, values in tables.items()), Picture(scale.bar())]
    if profile.alphas is not None:
        said.append(_agreement(profile, known))
        pictures.append(
            Picture(_against(profile, known), "Each mark is a head; filled ones stream in the default point.")
        )
    parts.append(Gallery(tuple(pictures), "In %."))
    if profile.alphas is None:
        said.append("No alphas were trained, so there is nothing that statistics could be compared with.")
    return Section("streaming", "Streaming heads", tuple(said), tuple(parts))


def _agreement(profile: Profile, far: dict[tuple[int, int], float]) -> str:
    assert profile.alphas is not None
    statistics = torch.full(profile.alphas.shape, torch.nan, dtype=torch.float64)  # of the heads that have a choice
    for place, value in far.items():
        statistics[place] = value
    found = agreement(profile.alphas.cpu(), statistics, HALF) if len(far) > 1 else None
    if found is None or not math.isfinite(found.correlation):
        return "Far mass and alphas cannot be compared: one of them is the same for all heads."
    ranked = found.correlation
    told = "agree" if ranked >= 0.7 else "agree in part" if ranked >= 0.3 else "do not agree"
    return (
        "DuoAttention's trained alphas (1 needs all tokens, 0 may stream) and far mass rank "
        f"{number_of(len(far), 'head')} with a Spearman correlation of {ranked:.2f}: they {told}. Of the half that "
        f"would stream by its alphas, {percent(found.overlap)} would by far mass ({percent(found.by_chance)} by "
        "chance)."
    )


def _against(profile: Profile, far: dict[tuple[int, int], float]) -> str:
    assert profile.alphas is not None
    point, alphas = default_point(profile), profile.alphas
    x = linear("far mass, %", [100 * value for value in far.values()])
    y = linear("trained alpha", [0.0, 1.0, *(float(alphas[place]) for place in far)])
    marks = []
    for (layer, head), value in far.items():
        kind = "first" if point.plan.heads[layer][head].streams else "first hollow"
        marks.append(Mark(100 * value, float(alphas[layer, head]), kind, title=f"head {layer}.{head}"))
    return scatter("alphas against far mass", x, y, marks)


def _mean(values: Sequence[float]) -> str:
    return percent(sum(values) / len(values)) if values else "–"
