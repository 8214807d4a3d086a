"""Where a profile's numbers come from and what they took, for a report."""

from collections.abc import Iterable

from gossamer.attention.profiling.profile import Profile
from gossamer.attention.profiling.prompts import TEXT
from gossamer.attention.profiling.report_parts import Section, Table, listed, lots, number_of, percent, seconds, size
from gossamer.attention.profiling.subject import CALIBRATED, SEARCHED, UNSEEN


def stages_section(profile: Profile) -> Section:
    heads = profile.shape.layers * profile.shape.kv_heads
    tokens = {_calibration(length): _tokens(profile, length) for length in profile.settings.lengths}
    rows = []
    for spent in profile.spent:
        each = "–"
        if spent.stage in tokens:
            each = seconds(spent.seconds / tokens[spent.stage] / heads)
        rows.append((spent.stage, seconds(spent.seconds), size(spent.memory), each))
    total, read = sum(spent.seconds for spent in profile.spent), sum(tokens.values())
    most = max((spent.memory for spent in profile.spent), default=0)
    rows.append(("all", seconds(total), size(most), seconds(total / read / heads)))
    said = (
        "Memory is the most that the process, or the GPU where there is one, had held by the end of a stage. What "
        "earlier runs took whose results were gone on from is counted. The last column divides by the tokens that "
        f"calibration reads, {read}, and by the {number_of(heads, 'KV head')}.",
    )
    columns = ("stage", "time", "memory", "per KV head and token")
    return Section("stages", "Time and memory of profiling", said, (Table(columns, tuple(rows)),))


def _calibration(length: int) -> str:
    return f"calibration at {length} tokens"


def _tokens(profile: Profile, length: int) -> int:
    """That calibration reads: documents of each task and plain texts. The trials have the same tasks."""
    tasks = {score.task for score in profile.points[0].searched.scores if score.length == length} | {TEXT}
    return len(tasks) * profile.settings.documents * length


def origins_section(profile: Profile) -> Section:
    settings, device, model, shape = profile.settings, profile.device, profile.model, profile.shape
    seeds = {
        name: f"{first + settings.seed} to {first + settings.seed + settings.documents - 1}"
        for name, first in (("calibration", CALIBRATED), ("search", SEARCHED), ("verification", UNSEEN))
    }
    source = profile.file.provenance
    asked = (
        ("lengths", f"{listed(map(str, settings.lengths))} tokens"),
        ("documents of each task and length", str(settings.documents)),
        ("questions about each, at most", str(settings.questions)),
        ("seed", str(settings.seed)),
        *((f"seeds of documents for {name}", spelled) for name, spelled in seeds.items()),
        ("goal", settings.goal),
        ("weight of memory", "the goal's own" if settings.memory is None else percent(settings.memory)),
        *(
            (f"bound of {bound.name}", f"{lots(bound.points)} of any task, {bound.divergence:g} nats")
            for bound in settings.bounds
        ),
        ("uniform rivals compared", _yes(settings.compare)),
        ("gates trained", _yes(settings.train_gates)),
        ("alphas trained", _yes(settings.train_heads)),
        *((f"{phase} candidates", str(len(own))) for phase, own in profile.candidates.items()),
    )
    windows = sorted({window for window in shape.windows if window is not None})
    known = (
        ("policy", profile.file.name),
        ("provenance in its file", f"{source.source}: {source.note}" if source.note else source.source),
        ("model", " ".join(each for each in (model.name, model.model_type and f"({model.model_type})") if each) or "–"),
        ("layers", f"{shape.layers}, of which {len(shape.free)} can be changed"),
        ("heads", f"{shape.kv_heads} KV heads and {shape.query_heads} query heads of {shape.head_dim} channels"),
        ("sliding windows of its own", listed(map(str, windows)) + " tokens" if windows else "none"),
        ("computed in", f"{str(shape.dtype).removeprefix('torch.')} on {shape.device}"),
        *profile.about.items(),
    )
    measured = (
        ("device", device.device),
        ("measured for", f"{device.ratio} query heads per KV head of {device.head_dim} channels, {device.dtype}"),
        *device.about.items(),
    )
    return Section(
        "provenance",
        "Provenance",
        (),
        (
            _pairs("profiled", known),
            _pairs("asked for", asked),
            _pairs("device profile", measured),
        ),
    )


def _pairs(title: str, pairs: Iterable[tuple[str, str]]) -> Table:
    return Table((title, ""), tuple(pairs), words=2)


def _yes(asked: bool) -> str:
    return "yes" if asked else "no"
