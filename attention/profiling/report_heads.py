"""What single heads do, for a report: their choices, density and error, and where the worst of them look."""

from collections import Counter
from collections.abc import Callable

from torch import Tensor

from gossamer.attention.policy_view import PHASES, Phase, view_point
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.profile import Point, Profile
from gossamer.attention.profiling.report_charts import bars
from gossamer.attention.profiling.report_doubts import predicted, unstable
from gossamer.attention.profiling.report_maps import Scale, Values, heat_map
from gossamer.attention.profiling.report_parts import (
    Gallery,
    HeadMap,
    Part,
    Picture,
    Section,
    Table,
    default_point,
    heads_of,
    longest,
    nats,
    number_of,
    percent,
    sparse,
)
from gossamer.attention.profiling.sensitivity import FLOOR
from gossamer.attention.profiling.statistics import HELD, NEAR, SINK
from gossamer.kernels.layout import PAGE_SIZE

WORST = 8  # heads that are shown


def maps_section(profile: Profile) -> Section:
    length = longest(profile)
    windows = tuple(layer for layer in range(profile.shape.layers) if layer not in profile.shape.free)
    said = (
        f"What each head does, as the command gossamer policy show draws it at {length} tokens: a letter for the "
        "backend, the paler the less is read by the parameters alone; ~ marks heads that stream and give memory back, "
        "? a density that is unknown until measured.",
    )
    maps = [HeadMap(view_point(profile.file, point.name, length), windows) for point in sparse(profile)]
    return Section("maps", "Head maps", said, (*maps, *(_chosen(profile, phase) for phase in PHASES)))


def _chosen(profile: Profile, phase: Phase) -> Table:
    """All candidates of a phase, and how many heads have them at each point."""
    length, own = longest(profile), sparse(profile)
    found = profile.found[phase][length]
    free = list(profile.shape.free)
    counts = {
        point.name: Counter(getattr(point.plan.heads[layer][head], phase) for layer, head in heads_of(profile))
        for point in own
    }

    def mean(table: Tensor, number: int) -> str:
        return percent(float(table[number, free].mean())) if free else "–"

    rows = tuple(
        (
            candidate.text,
            mean(found.density, number),
            mean(found.error.sqrt(), number),
            mean(found.recall, number),
            *(str(counts[point.name][number]) for point in own),
        )
        for number, candidate in enumerate(profile.candidates[phase])
    )
    columns = (f"{phase} candidate", "density", "error", "recall", *(f"heads in {point.name}" for point in own))
    caption = f"All candidates of {phase}: means over the heads that have a choice, at {length} tokens."
    return Table(columns, rows, caption=caption, folded=True)


def heads_section(profile: Profile) -> Section:
    length = longest(profile)
    said = (
        f"Of the candidate that each head got, at {length} tokens. The error is that of the head's output behind the "
        "output projection, relative to the attention output of its whole layer, so that heads compare. Dense heads "
        "read 100% and have none.",
    )
    parts: list[Part] = [_stability(profile)]
    densities = {(point.name, phase): _density(profile, point, phase) for point in sparse(profile) for phase in PHASES}
    errors = {(point.name, phase): _error(profile, point, phase) for point in sparse(profile) for phase in PHASES}
    spreads = {(point.name, phase): _spread(profile, point, phase) for point in sparse(profile) for phase in PHASES}
    drifts = {(point.name, phase): _drift(profile, point, phase) for point in sparse(profile) for phase in PHASES}
    shortest = min(profile.settings.lengths)
    parts.append(_gallery(densities, f"Density at {length} tokens, %.", logarithmic=True))
    parts.append(_gallery(errors, f"Relative error at {length} tokens, %.", logarithmic=True))
    parts.append(
        _gallery(spreads, "Standard deviation of that error over documents, %.", logarithmic=True, folded=True)
    )
    if shortest < length:
        caption = f"Error at {length} tokens as a share of that at {shortest}, %: above 100 it grows with the length."
        parts.append(_gallery(drifts, caption, folded=True))
    return Section("heads", "Density and error of each head", said, tuple(parts) if sparse(profile) else ())


def _table(profile: Profile, value: Callable[[int, int], float | None]) -> Values:
    free = set(profile.shape.free)
    return [
        [value(layer, head) if layer in free else None for head in range(profile.shape.kv_heads)]
        for layer in range(profile.shape.layers)
    ]


def _chosen_of(found: Found, name: str, point: Point, phase: Phase) -> Callable[[int, int], float]:
    table: Tensor = getattr(found, name)
    return lambda layer, head: float(table[getattr(point.plan.heads[layer][head], phase), layer, head])


def _density(profile: Profile, point: Point, phase: Phase) -> Values:
    return _table(profile, _chosen_of(profile.found[phase][longest(profile)], "density", point, phase))


def _error(profile: Profile, point: Point, phase: Phase) -> Values:
    squared = _chosen_of(profile.found[phase][longest(profile)], "error", point, phase)
    return _table(profile, lambda layer, head: squared(layer, head) ** 0.5)


def _spread(profile: Profile, point: Point, phase: Phase) -> Values:
    return _table(profile, _chosen_of(profile.found[phase][longest(profile)], "spread", point, phase))


def _drift(profile: Profile, point: Point, phase: Phase) -> Values:
    """Dense heads have none."""
    lengths = profile.settings.lengths
    short, long = (
        _chosen_of(profile.found[phase][length], "error", point, phase) for length in (min(lengths), max(lengths))
    )

    def share(layer: int, head: int) -> float | None:
        before = short(layer, head)
        return (long(layer, head) / before) ** 0.5 if before > 0 else None

    return _table(profile, share)


def _gallery(
    maps: dict[tuple[str, Phase], Values], caption: str, *, logarithmic: bool = False, folded: bool = False
) -> Gallery:
    scale = Scale.over(list(maps.values()), percent, _short, logarithmic=logarithmic)
    pictures = [Picture(heat_map(f"{name}, {phase}", values, scale)) for (name, phase), values in maps.items()]
    return Gallery((*pictures, Picture(scale.bar())), caption, folded)


def _short(share: float) -> str:
    """Per cents in three characters or so."""
    value = 100 * share
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"[1:]


def _stability(profile: Profile) -> Table:
    lengths, rows = profile.settings.lengths, []
    for point in sparse(profile):
        for phase in PHASES:
            errors = []
            for length in lengths:
                squared = _chosen_of(profile.found[phase][length], "error", point, phase)
                own = [squared(layer, head) ** 0.5 for layer, head in heads_of(profile)]
                errors.append(percent(sum(own) / len(own)) if own else "–")
            spread = _chosen_of(profile.found[phase][max(lengths)], "spread", point, phase)
            spreads = [spread(layer, head) for layer, head in heads_of(profile)]
            unlike, chosen = unstable(profile, point, phase)
            mean = percent(sum(spreads) / len(spreads)) if spreads else "–"
            rows.append((point.name, phase, str(chosen), *errors, mean, str(unlike)))
    columns = (
        "operating point",
        "phase",
        "heads that are not dense",
        *(f"error at {length}" for length in lengths),
        "spread over documents",
        "heads that spread more than they err",
    )
    return Table(columns, tuple(rows), words=2, caption="Means over all heads that have a choice.")


def worst_section(profile: Profile) -> Section:
    point, length = default_point(profile), longest(profile)
    shares = {place: predicted(profile, point, *place) for place in heads_of(profile)}
    order = sorted(shares, key=lambda place: -sum(shares[place].values()))
    worst = [place for place in order if sum(shares[place].values()) > 0][:WORST]
    title = f"The worst heads of {point.name}"
    if not worst:
        return Section("worst", title, ("No head is predicted to lead away from dense.",))
    looks = profile.looks[length]
    queries = max(1.0, float(looks.queries))
    total = sum(sum(each.values()) for each in shares.values())
    told = sum(sum(shares[place].values()) for place in worst)
    rows, pictures = [], []
    for layer, head in worst:
        choice, nats_ = point.plan.heads[layer][head], shares[layer, head]
        masses = [percent(float(each[layer, head]) / queries) for each in (looks.sink, looks.near, looks.pages)]
        for phase in PHASES:
            number = getattr(choice, phase)
            found = profile.found[phase][length]
            numbers = (
                nats(nats_[phase]),
                f"{float(profile.sensitivity[phase][layer, head]):.3g}",
                percent(float(found.error[number, layer, head]) ** 0.5),
                percent(float(found.recall[number, layer, head])),
                percent(float(found.density[number, layer, head])),
            )
            candidate = profile.candidates[phase][number].text + (", streams" if choice.streams else "")
            rows.append((f"{layer}.{head}", phase, candidate, *numbers, *masses))
        mass = [float(each) / queries for each in looks.distance[layer, head]]
        names = [_tokens(PAGE_SIZE << n) for n in range(len(mass))]
        picture = bars(
            f"head {layer}.{head}: attention mass by distance", names, mass, "% of mass, nearer than … tokens"
        )
        pictures.append(Picture(picture, f"Head {layer}.{head}"))
    columns = (
        "layer.head",
        "phase",
        "candidate",
        "nats, predicted",
        "sensitivity",
        "error",
        "recall",
        "density",
        f"mass of the first {SINK}",
        f"of the last {NEAR}",
        f"pages that hold {100 * HELD:.0f}%",
    )
    said = (
        f"The {number_of(len(worst), 'head')} with the largest predicted divergence in {point.name}, the default: "
        f"{percent(told / total)} of the {nats(total)} nats that all heads are predicted to add. Sensitivity is in "
        f"nats for a squared relative error of 1, and none is taken for less than {percent(FLOOR)} of the mean; "
        f"error and recall (of dense attention mass) are at {length} tokens.",
    )
    caption = (
        "Where a head's attention mass lies under dense attention, by distance from the query; each bar is without "
        "those before it, and the first tokens of a text count at their distance."
    )
    return Section("worst", title, said, (Gallery(tuple(pictures), caption), Table(columns, tuple(rows), words=3)))


def _tokens(count: int) -> str:
    return f"{count >> 10}K" if count >= 1024 else str(count)
