"""Per-head choice against the same candidate for every head."""

from dataclasses import dataclass
from typing import Literal

from gossamer.attention.profiling.fidelity import Trial
from gossamer.attention.profiling.profile import Profile, Rival
from gossamer.attention.profiling.report_parts import Section, Table, longest, nats, number_of, percent, sparse
from gossamer.attention.profiling.report_verdicts import losses_of

Outcome = Literal["won", "lost", "neither"]
ALIKE = 1.02  # times: densities and costs within it are equal


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether per-head choice won: less divergence for no more density, and for no more predicted cost."""

    rival: Rival
    by_density: Outcome
    by_cost: Outcome


def compared(profile: Profile) -> list[Comparison]:
    if not profile.rivals:
        return []
    point, length = sparse(profile)[0], longest(profile)
    own = point.unseen.divergence()
    found = []
    for rival in profile.rivals:
        other = rival.unseen.divergence()
        density = judged(own, point.density[rival.phase][length], other, rival.density)
        found.append(Comparison(rival, density, judged(own, point.plan.cost, other, rival.plan.cost)))
    return found


def judged(own: float, price: float, other: float, other_price: float) -> Outcome:
    """Of divergences, at what was paid for them."""
    if own < other and price <= other_price * ALIKE:
        return "won"
    return "lost" if other < own and other_price <= price * ALIKE else "neither"


def nearer(one: Trial, other: Trial) -> tuple[int, int]:
    """In how many exchanges the one diverged less than the other, of how many in which they differ."""
    pairs = [
        (a.divergence, b.divergence)
        for a, b in zip(one.scores, other.scores, strict=True)
        if (a.task, a.length) == (b.task, b.length)
    ]
    return sum(a < b for a, b in pairs), sum(a != b for a, b in pairs)


def rivals_section(profile: Profile) -> Section:
    results = compared(profile)
    title = "Against the same backend for every head"
    if not results:
        return Section("rivals", title, ("No comparison was asked for.",))
    point, length = sparse(profile)[0], longest(profile)
    densities, costs = ([getattr(each, by) for each in results] for by in ("by_density", "by_cost"))
    said = (
        f"Every rival gives one candidate to all heads in one phase, at a density as near to that of {point.name} as "
        f"its parameters allow, and leaves the other phase as {point.name} has it. It chooses at {length} tokens also "
        "where that is not worth it on this device, and a policy would leave the head dense. Of "
        f"{number_of(len(results), 'comparison')}, per-head choice won {densities.count('won')} and lost "
        f"{densities.count('lost')} at equal density; at equal predicted cost it won {costs.count('won')} and lost "
        f"{costs.count('lost')}. The rest have no winner.",
        "Won means: less divergence on unseen documents while reading, or costing, no more. Nearer says in how many "
        f"exchanges {point.name} was nearer to dense, of those where the two differ.",
    )
    dense, rows = profile.points[0].unseen, []
    marked: set[tuple[int, int]] = set()
    for number, each in enumerate(results):
        rival = each.rival
        worst = max(losses_of(dense, rival.unseen).values(), key=lambda loss: loss.points, default=None)
        close, of = nearer(point.unseen, rival.unseen)
        numbers = (
            percent(rival.density),
            percent(point.density[rival.phase][length]),
            percent(rival.plan.cost),
            percent(point.plan.cost),
            nats(rival.unseen.divergence()),
            nats(point.unseen.divergence()),
            worst.text() if worst else "nothing asked",
            f"{close} of {of}",
        )
        rows.append((rival.phase, rival.name, each.by_density, each.by_cost, *numbers))
        marked |= {(number, 2 + n) for n, by in enumerate((each.by_density, each.by_cost)) if by == "lost"}
    columns = (
        "phase",
        "for every head",
        "per head, by density",
        "per head, by cost",
        f"density at {length}",
        f"of {point.name}",
        "cost",
        f"of {point.name}",
        "nats from dense",
        f"of {point.name}",
        "worst task loss, points",
        "nearer",
    )
    table = Table(columns, tuple(rows), words=4, marked=frozenset(marked))
    return Section("rivals", title, said, (table,))
