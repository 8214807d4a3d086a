"""What speaks against trusting a profile, each from its own numbers, in one sentence."""

from collections.abc import Iterator

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.profile import Point, Profile
from gossamer.attention.profiling.report_gates import means, why
from gossamer.attention.profiling.report_parts import (
    heads_of,
    listed,
    longest,
    nats,
    number_of,
    percent,
    sparse,
)
from gossamer.attention.profiling.report_rivals import compared
from gossamer.attention.profiling.report_verdicts import Answers

WEAK = 0.6  # of the answers under dense attention: below, a task tells little
OFF = 3.0  # times, by which a prediction or an unseen document may differ
FEW_DOCUMENTS = 4


def doubts(profile: Profile) -> list[str]:
    """The weightiest first; none is no proof."""
    found = [
        *_weak_tasks(profile),
        *_few_documents(profile),
        *_device(profile),
        *_predictions(profile),
        *_unlike(profile),
        *_sums(profile),
        *_unstable(profile),
        *_reads(profile),
        *_rivals(profile),
        *_gates(profile),
        *_tied(profile),
    ]
    lengths = profile.settings.lengths
    return [*found, f"Nothing is known of texts longer than {max(lengths)} tokens, or of tasks unlike these."]


def _weak_tasks(profile: Profile) -> Iterator[str]:
    cells = profile.points[0].unseen.cells()
    weak = {key: cell for key, cell in cells.items() if cell.accuracy is not None and not cell.accuracy >= WEAK}
    if weak:
        told = [f"{task} at {length} ({Answers.in_cell(cell).text()})" for (task, length), cell in weak.items()]
        yield (
            f"Dense attention itself fails at {listed(told)}: what a model cannot do, no policy can lose, so these say "
            "little."
        )


def _few_documents(profile: Profile) -> Iterator[str]:
    documents = profile.settings.documents
    if documents < FEW_DOCUMENTS:
        yield (
            f"Heads were judged by {number_of(documents, 'document')} of each task and length; another seed may choose "
            "differently."
        )


def _device(profile: Profile) -> Iterator[str]:
    device, shape = profile.device, profile.shape
    dtype = str(shape.dtype).removeprefix("torch.")
    theirs, ours = (device.ratio, device.head_dim, device.dtype), (shape.ratio, shape.head_dim, dtype)
    if theirs != ours:
        told = ["{} query heads per KV head of {} channels in {}".format(*each) for each in (theirs, ours)]
        yield (
            f"The device profile is for {told[0]}, but this model has {told[1]}: predicted costs are for other heads; "
            "leave --device-profile out to measure."
        )


def _predictions(profile: Profile) -> Iterator[str]:
    for point in sparse(profile):
        predicted, measured = point.plan.divergence, point.searched.divergence()
        if predicted > 0 and measured > 0 and max(predicted / measured, measured / predicted) > OFF:
            yield (
                f"{point.name}: {nats(predicted)} nats were predicted and {nats(measured)} measured, so errors of "
                "heads do not add up as the search assumes. It went by what was measured, but which heads it chose is "
                "less sure."
            )


def _unlike(profile: Profile) -> Iterator[str]:
    for point in sparse(profile):
        searched, unseen = point.searched.divergence(), point.unseen.divergence()
        if searched > 0 and unseen > OFF * searched:
            yield (
                f"{point.name}: {nats(unseen)} nats from dense on unseen documents against {nats(searched)} in the "
                "search; the plan fits the documents that it was chosen by."
            )


def _sums(profile: Profile) -> Iterator[str]:
    for point in sparse(profile):
        own = sum(sum(predicted(profile, point, layer, head).values()) for layer, head in heads_of(profile))
        if abs(own - point.plan.divergence) > 1e-6 + 1e-3 * abs(point.plan.divergence):
            yield (
                f"{point.name}: the predictions of its heads add up to {nats(own)} nats, but the plan says "
                f"{nats(point.plan.divergence)}; the tables of this profile do not belong together."
            )


def _unstable(profile: Profile) -> Iterator[str]:
    for point in sparse(profile):
        for phase in PHASES:
            unlike, chosen = unstable(profile, point, phase)
            if 4 * unlike > chosen:
                yield (
                    f"{point.name}, {phase}: the error of {unlike} of {chosen} heads that do not read everything "
                    "varies over documents by more than its own size; more documents would make these choices surer."
                )


def _reads(profile: Profile) -> Iterator[str]:
    for point in sparse(profile):
        for phase in PHASES:
            for length, density in point.density[phase].items():
                read = read_in(point, phase, length)
                if read is not None and density > 0 and max(read / density, density / max(read, 1e-9)) > 2:
                    yield (
                        f"{point.name}, {phase} at {length} tokens: {percent(read)} were read on unseen documents, but "
                        f"calibration found {percent(density)}, which costs are predicted from."
                    )


def _rivals(profile: Profile) -> Iterator[str]:
    for what, by, no_more in (("density", "by_density", "reading"), ("predicted cost", "by_cost", "costing")):
        lost = [each.rival for each in compared(profile) if getattr(each, by) == "lost"]
        if lost:
            told = [f"{rival.name} ({rival.phase})" for rival in lost]
            yield (
                f"{sparse(profile)[0].name} lost at equal {what} to one backend for every head: {listed(told)} "
                f"diverged less while {no_more} no more."
            )


def _gates(profile: Profile) -> Iterator[str]:
    for phase, recall in (profile.gates or {}).items():
        gate, pooled = means(profile, recall)
        if not gate > pooled:
            yield (
                f"The learned gate of {phase} finds no more than pooled keys do at equal density (recall "
                f"{percent(gate)} against {percent(pooled)}), which does not pay for its memory; {why(profile, phase)}"
            )


def _tied(profile: Profile) -> Iterator[str]:
    windows = [layer for layer in range(profile.shape.layers) if layer not in profile.shape.free]
    if windows:
        yield (
            f"{number_of(len(windows), 'layer')} of {profile.shape.layers} have a sliding window of the model's own; a "
            "policy changes nothing there, and means over heads count them as dense."
        )


def predicted(profile: Profile, point: Point, layer: int, head: int) -> dict[Phase, float]:
    """Nats from dense that the search predicts for one head: its sensitivity times its largest squared error over the
    lengths at which its candidate does anything."""
    choice = point.plan.heads[layer][head]
    found = {}
    for phase in PHASES:
        number = choice.of(phase)
        above = profile.above[phase].get(profile.candidates[phase][number].kind, 0)
        errors = [float(each.error[number, layer, head]) for n, each in profile.found[phase].items() if n > above]
        found[phase] = float(profile.sensitivity[phase][layer, head]) * max(errors, default=0.0)
    return found


def unstable(profile: Profile, point: Point, phase: Phase) -> tuple[int, int]:
    """How many heads have an error that varies more over documents than it is large, at the longest length; of how
    many that do not read everything."""
    found, unlike, chosen = profile.found[phase][longest(profile)], 0, 0
    for layer, head in heads_of(profile):
        number = getattr(point.plan.heads[layer][head], phase)
        if number:  # 0 is dense
            chosen += 1
            unlike += bool(found.spread[number, layer, head] > found.error[number, layer, head] ** 0.5)
    return unlike, chosen


def read_in(point: Point, phase: Phase, length: int) -> float | None:
    """The share of what could be read that was, on unseen documents."""
    if length not in point.unseen.reads:
        return None
    reads = point.unseen.reads[length]
    pairs = {
        "prefill": (reads.prefill_read, reads.prefill_possible),
        "decode": (reads.decode_read, reads.decode_possible),
    }
    read, possible = pairs[phase]
    return read / possible if possible else None
