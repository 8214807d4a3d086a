"""Per-head choice against the same candidate for every head."""

from typing import Literal

from gossamer.attention.profiling.fidelity import Trial
from gossamer.attention.profiling.profile import Point, Profile, Rival
from gossamer.attention.profiling.report_parts import Section, Table, longest, nats, number_of, percent, sparse
from gossamer.attention.profiling.report_verdicts import losses_of

Outcome = Literal["won", "lost", "open"]
ALIKE = 1.02  # times: densities within it are equal


def judged(point: Point, rival: Rival, length: int) -> tuple[Outcome, str]:
    """Whether per-head choice won, by divergence at equal density, and in words."""
    ours, theirs = point.density[rival.phase][length], rival.density
    own, other = point.unseen.divergence(), rival.unseen.divergence()
    same = theirs <= ours * ALIKE and ours <= theirs * ALIKE
    if own < other and ours <= theirs * ALIKE:
        less = "at the same density" if same else "reading less"
        return "won", f"per-head choice won, {less}"
    if other < own and theirs <= ours * ALIKE:
        less = "at the same density" if same else "reading less"
        return "lost", f"per-head choice lost; this one diverges less {less}"
    why = "one reads less, the other diverges less" if own != other else "both diverge alike"
    return "open", f"neither won: {why}"


def compared(profile: Profile) -> list[tuple[Rival, Outcome, str]]:
    if not profile.rivals:
        return []
    point, length = sparse(profile)[0], longest(profile)
    return [(rival, *judged(point, rival, length)) for rival in profile.rivals]


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
    counts = {outcome: sum(each == outcome for _, each, _ in results) for outcome in ("won", "lost", "open")}
    said = (
        f"Every rival gives one candidate to all heads in one phase, at a density as near to that of {point.name} as "
        f"its parameters allow, and leaves the other phase as {point.name} has it. Per-head choice won "
        f"{counts['won']} of {number_of(len(results), 'comparison')}, lost {counts['lost']}, and {counts['open']} have "
        "no winner.",
        "Won means: less divergence on unseen documents while reading no more. Nearer says in how many exchanges "
        f"{point.name} was nearer to dense, of those where the two differ.",
    )
    dense, rows, marked = profile.points[0].unseen, [], set()
    for number, (rival, outcome, told) in enumerate(results):
        worst = max(losses_of(dense, rival.unseen).values(), key=lambda each: each.points, default=None)
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
        rows.append((rival.phase, rival.name, told, *numbers))
        if outcome == "lost":
            marked.add((number, 2))
    columns = (
        "phase",
        "for every head",
        "per-head choice",
        f"density at {length}",
        f"of {point.name}",
        "cost",
        f"of {point.name}",
        "nats from dense",
        f"of {point.name}",
        "worst task loss, points",
        "nearer",
    )
    table = Table(columns, tuple(rows), words=3, marked=frozenset(marked))
    return Section("rivals", title, said, (table,))
