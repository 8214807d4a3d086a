"""What the operating points do, for a report: verdicts, tasks, accuracy against cost, density and memory."""

from collections.abc import Sequence

from gossamer.attention.policy_view import PHASES
from gossamer.attention.profiling.fidelity import Trial
from gossamer.attention.profiling.profile import Attempt, Profile
from gossamer.attention.profiling.report_charts import (
    Line,
    Mark,
    Series,
    intervals,
    linear,
    logarithmic,
    scatter,
    staircase,
)
from gossamer.attention.profiling.report_doubts import read_in
from gossamer.attention.profiling.report_parts import (
    Gallery,
    Picture,
    Section,
    Table,
    longest,
    nats,
    number_of,
    percent,
    points,
    sparse,
)
from gossamer.attention.profiling.report_verdicts import Answers, Verdict, losses_of

KINDS = ("dense", "first", "second", "third", "fourth", "fifth")  # classes that have a colour
POINT_SHAPES = ("circle", "square", "triangle", "diamond")


def kind_of(profile: Profile, name: str) -> str:
    """The class of an operating point's colour."""
    number = [point.name for point in profile.points].index(name)
    return KINDS[number] if number < len(KINDS) else KINDS[1 + (number - 1) % (len(KINDS) - 1)]


def shape_of(profile: Profile, name: str) -> str:
    return POINT_SHAPES[[point.name for point in profile.points].index(name) % len(POINT_SHAPES)]


def verdict_table(profile: Profile, verdicts: Sequence[Verdict]) -> Table:
    """A line for each operating point."""
    length = longest(profile)
    rows, marked = [], set()
    for number, each in enumerate(verdicts):
        point, bound = each.point, each.point.bound
        answers = f"{each.worst.own.of} of {each.total.own.of}" if each.worst and each.total and bound else "–"
        rows.append(
            (
                point.name,
                each.standing,
                percent(point.plan.cost),
                percent(point.density["prefill"][length]),
                percent(point.density["decode"][length]),
                percent(point.memory[length]),
                nats(point.unseen.divergence()),
                f"{bound.divergence:g}" if bound else "–",
                f"{each.worst.text()}, {each.worst.where}" if each.worst and bound else "–",
                f"{bound.points:g}" if bound else "–",
                answers,
            )
        )
        if each.standing.startswith("not held"):
            marked.add((number, 1))
    columns = (
        "operating point",
        "bound on unseen documents",
        "cost of dense, predicted",
        f"prefill density at {length}",
        f"decode density at {length}",
        f"KV memory at {length}",
        "nats from dense, unseen",
        "allowed",
        "worst task loss, points [95%]",
        "allowed",
        "answers: in it, of all",
    )
    return Table(columns, tuple(rows), words=2, marked=frozenset(marked))


def tasks_section(profile: Profile) -> Section:
    dense, own = profile.points[0], sparse(profile)
    cells = dense.unseen.cells()
    losses = {point.name: losses_of(dense.unseen, point.unseen) for point in own}
    rows: list[tuple[str, ...]] = []
    marked = set()
    for key, cell in cells.items():
        if cell.accuracy is None:
            continue
        row = [key[0], str(key[1]), str(cell.references), percent(cell.accuracy)]
        for point in own:
            loss = losses[point.name][key]
            if point.bound is not None and not loss.points <= point.bound.points:
                marked.add((len(rows), len(row) + 1))
            row += [f"{percent(loss.own.share)}", loss.text()]
        rows.append(tuple(row))
    columns = ["task", "tokens", "answers", dense.name]
    for point in own:
        columns += [point.name, f"{point.name} lost, points [95%]"]
    parts: list[Table | Gallery] = []
    if rows:
        parts.append(_task_pictures(profile))
        parts.append(Table(tuple(columns), tuple(rows), words=1, marked=frozenset(marked)))
    parts.append(_nearness(profile))
    said = (
        "On documents that nothing was chosen by. An answer counts when each of its tokens is the likeliest after the "
        "right ones before it; questions may ask for several. In brackets are 95% intervals; answers about one "
        "document are not independent, so the truth may lie further off than they say.",
    )
    return Section("tasks", "Tasks by length", said, tuple(parts))


def _task_pictures(profile: Profile) -> Gallery:
    tasks = dict.fromkeys(task for task, _ in profile.points[0].unseen.cells())
    lengths = profile.settings.lengths
    pictures = []
    for task in tasks:
        series = []
        for point in profile.points:
            cells = point.unseen.cells()
            values: list[tuple[float, float, float] | None] = []
            for length in lengths:
                cell = cells.get((task, length))
                if cell is None or cell.accuracy is None:
                    values.append(None)
                    continue
                answers = Answers.in_cell(cell)
                low, high = answers.interval
                values.append((low, answers.share, high))
            series.append(Series(kind_of(profile, point.name), shape_of(profile, point.name), tuple(values)))
        if any(value for one in series for value in one.values):
            pictures.append(Picture(intervals(task, [f"{length}" for length in lengths], series, "tokens")))
    names = ", ".join(f"{shape_of(profile, point.name)} {point.name}" for point in profile.points)
    return Gallery(tuple(pictures), f"Right answers with 95% Wilson intervals. From left to right: {names}.")


def _nearness(profile: Profile) -> Table:
    own = sparse(profile)
    rows = []
    for (task, length), cell in profile.points[0].unseen.cells().items():
        row = [task, str(length), str(cell.exchanges)]
        for point in own:
            found = point.unseen.cells()[task, length]
            row += [nats(found.divergence), percent(found.agreement)]
        rows.append(tuple(row))
    columns = ["task", "tokens", "texts"]
    for point in own:
        columns += [f"{point.name}: nats from dense", "same next token"]
    return Table(
        tuple(columns),
        tuple(rows),
        words=1,
        caption="Next-token distributions against dense: Kullback-Leibler divergence in nats, mean over the answer's "
        "tokens, and how often both say the same token next.",
    )


def cost_section(profile: Profile) -> Section:
    weights, goal = profile.weights, profile.settings.goal
    said = (
        f"Cost is predicted from the device profile of {profile.device.device}, for {goal}: {percent(weights.prefill)} "
        f"prefill time, {percent(weights.decode)} decode time ({number_of(weights.sequences, 'sequence')} at once), "
        f"{percent(weights.memory)} KV memory, each as a share of "
        "what dense attention takes, over the profiled lengths. It is attention alone, not the whole model.",
    )
    caption = (
        f"Small marks are the {number_of(len(profile.attempts), 'plan')} that the search tried on its own documents; "
        "hollow ones broke the bound, and were tried no further than to the length that broke it. Stars are the "
        "operating points on unseen documents. The stepped line joins plans that no other beats in cost and divergence."
    )
    points_ = [(point.plan.cost, point.unseen.divergence()) for point in profile.points]
    measured = [attempt.divergence for attempt in profile.attempts] + [y for _, y in points_]
    x = linear(
        "predicted cost, % of dense",
        [100 * attempt.plan.cost for attempt in profile.attempts]
        + [100 * x for x, _ in points_]
        + [100 * rival.plan.cost for rival in profile.rivals],
    )
    y = logarithmic(
        "nats from dense, measured",
        [*measured, *(point.bound.divergence for point in profile.points if point.bound)]
        + [rival.unseen.divergence() for rival in profile.rivals],
    )
    edge = staircase((attempt.plan.cost, attempt.divergence) for attempt in profile.attempts)
    lines = [Line(tuple((100 * a, b) for a, b in edge), "faint")] if edge else []
    for point in sparse(profile):
        if point.bound is not None:
            kind, limit = kind_of(profile, point.name), point.bound.divergence
            lines.append(Line(((x.low, limit), (x.high, limit)), f"{kind} dashed", f"limit of {point.name}"))
    marks = [
        *(
            Mark(100 * r.plan.cost, r.unseen.divergence(), "rival", "cross", title=_rival(r.name))
            for r in profile.rivals
        ),
        *(_tried(profile, attempt, 100 * attempt.plan.cost, attempt.divergence) for attempt in profile.attempts),
        *(
            Mark(
                100 * p.plan.cost, p.unseen.divergence(), kind_of(profile, p.name), "star", p.name, f"{p.name}, unseen"
            )
            for p in profile.points
        ),
    ]
    pictures = [
        Picture(
            scatter("divergence against cost", x, y, marks, lines),
            "Divergence against cost"
            + ("; crosses are uniform rivals on unseen documents." if profile.rivals else "."),
        ),
        Picture(_loss_chart(profile), "Worst task loss against cost."),
        Picture(_prediction_chart(profile), "Measured against predicted divergence; on the diagonal they agree."),
    ]
    return Section(
        "cost",
        "Accuracy against cost",
        said,
        (Gallery(tuple(pictures), caption), _predictions(profile), _tries(profile)),
    )


def _rival(name: str) -> str:
    return f"{name} for every head, unseen"


def _tried(profile: Profile, attempt: Attempt, x: float, y: float) -> Mark:
    held = "held" if attempt.held else "broke the bound"
    told = f"tried for {attempt.point}: {percent(attempt.plan.cost)} of dense, {nats(attempt.divergence)} nats, "
    return Mark(
        x,
        y,
        kind_of(profile, attempt.point) + ("" if attempt.held else " hollow"),
        shape_of(profile, attempt.point),
        title=f"{told}{points(attempt.lost)} points lost at most; {held}",
    )


def _worst(dense: Trial, trial: Trial) -> float:
    return max([0.0, *(loss.points for loss in losses_of(dense, trial).values())])


def _loss_chart(profile: Profile) -> str:
    dense, own = profile.points[0].unseen, {p.name: _worst(profile.points[0].unseen, p.unseen) for p in profile.points}
    costs = [100 * attempt.plan.cost for attempt in profile.attempts]
    rivals = [(100 * rival.plan.cost, _worst(dense, rival.unseen), rival.name) for rival in profile.rivals]
    x = linear(
        "predicted cost, % of dense",
        [*costs, *(100 * p.plan.cost for p in profile.points), *(cost for cost, _, _ in rivals)],
    )
    limits = {point.name: point.bound.points for point in profile.points if point.bound is not None}
    losses = [*(attempt.lost for attempt in profile.attempts), *own.values(), *(lost for _, lost, _ in rivals)]
    y = linear("points lost by the worst task", [*losses, *limits.values()])
    lines = [
        Line(((x.low, limit), (x.high, limit)), f"{kind_of(profile, name)} dashed", f"limit of {name}")
        for name, limit in limits.items()
    ]
    marks = [
        *(Mark(cost, lost, "rival", "cross", title=_rival(name)) for cost, lost, name in rivals),
        *(_tried(profile, attempt, 100 * attempt.plan.cost, attempt.lost) for attempt in profile.attempts),
        *(
            Mark(100 * p.plan.cost, own[p.name], kind_of(profile, p.name), "star", p.name, f"{p.name}, unseen")
            for p in profile.points
        ),
    ]
    return scatter("worst task loss against cost", x, y, marks, lines)


def _prediction_chart(profile: Profile) -> str:
    pairs = [(each.plan.divergence, each.divergence) for each in profile.attempts]
    pairs += [(point.plan.divergence, point.unseen.divergence()) for point in sparse(profile)]
    both = [value for pair in pairs for value in pair]
    x, y = logarithmic("nats from dense, predicted", both), logarithmic("nats from dense, measured", both)
    marks = [
        *(_tried(profile, attempt, attempt.plan.divergence, attempt.divergence) for attempt in profile.attempts),
        *(
            Mark(
                p.plan.divergence, p.unseen.divergence(), kind_of(profile, p.name), "star", p.name, f"{p.name}, unseen"
            )
            for p in sparse(profile)
        ),
    ]
    return scatter(
        "predicted and measured divergence", x, y, marks, [Line(((x.low, y.low), (x.high, y.high)), "faint")]
    )


def _predictions(profile: Profile) -> Table:
    rows = tuple(
        (
            point.name,
            percent(point.plan.cost),
            nats(point.plan.divergence),
            nats(point.searched.divergence()),
            nats(point.unseen.divergence()),
            points(_worst(profile.points[0].searched, point.searched)),
            points(_worst(profile.points[0].unseen, point.unseen)),
        )
        for point in profile.points
    )
    columns = (
        "operating point",
        "cost of dense",
        "nats, predicted",
        "nats, in the search",
        "nats, unseen",
        "points lost at most, in the search",
        "points lost at most, unseen",
    )
    return Table(columns, rows)


def _tries(profile: Profile) -> Table:
    rows = tuple(
        (
            attempt.point,
            "held" if attempt.held else "broke",
            nats(attempt.budget),
            percent(attempt.plan.cost),
            nats(attempt.plan.divergence),
            nats(attempt.divergence),
            points(attempt.lost),
        )
        for attempt in profile.attempts
    )
    columns = (
        "tried for",
        "bound",
        "budget, nats",
        "cost of dense",
        "nats, predicted",
        "nats, measured",
        "points lost at most",
    )
    return Table(
        columns,
        rows,
        words=2,
        caption="Every plan that was tried, until the first length at which it broke its bound.",
        folded=True,
    )


def density_section(profile: Profile) -> Section:
    rows = []
    for point in profile.points:
        for length in profile.settings.lengths:
            row = [point.name, str(length)]
            for phase in PHASES:
                read = read_in(point, phase, length)
                row += [percent(point.density[phase][length]), "–" if read is None else percent(read)]
            rows.append((*row, percent(point.memory[length])))
    columns = ["operating point", "tokens"]
    for phase in PHASES:
        columns += [f"{phase}, calibrated", f"{phase}, unseen"]
    said = (
        "Density is the share of the keys that could be read which is read, mean over heads: as calibration found it, "
        "where queries are sampled, and as it was on unseen documents, where questions share the text before them. KV "
        "memory counts keys, values and page summaries, as a share of dense, behind so many tokens.",
    )
    table = Table((*columns, "KV memory"), tuple(rows))
    return Section("density", "Density and memory", said, (table,))
