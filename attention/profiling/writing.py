"""From choices to a policy file: rows as few as people can read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any

from gossamer.attention.policy_file import ModelEntry, PolicyFile, Provenance
from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.options import Assignment, Choice

Entry = Mapping[str, Any]  # a HeadEntry, as the file has it


def policy_file(
    name: str,
    model: ModelEntry,
    provenance: Provenance,
    points: Mapping[str, Assignment],
    candidates: Mapping[Phase, Sequence[Candidate]],
    above: Mapping[Phase, Mapping[str, int]],
    safer: Mapping[str, str] = MappingProxyType({}),
) -> PolicyFile:
    """points: by name, the first is the default. above: by kind of candidate, the length from which it is worth it.
    safer: by point, the one to use where it loses too much."""
    return PolicyFile.model_validate(
        {
            "gossamer_policy": 1,
            "name": name,
            "model": model.model_dump(exclude_none=True),
            "provenance": provenance.model_dump(),
            "points": {
                point: ({"safer": safer[point]} if point in safer else {}) | _point(heads, candidates, above)
                for point, heads in points.items()
            },
        }
    )


def _point(
    heads: Assignment, candidates: Mapping[Phase, Sequence[Candidate]], above: Mapping[Phase, Mapping[str, int]]
) -> dict[str, Any]:
    """The commonest choice is the default; the others have a row for each set of layers with the same heads."""
    counts = Counter(choice for row in heads for choice in row)
    if not counts:
        return {}
    default, _ = counts.most_common(1)[0]
    rows = []
    for choice in sorted(counts, key=lambda each: (-counts[each], each.prefill, each.decode, each.streams)):
        if choice == default:
            continue
        by_layer = [(tuple(h for h, own in enumerate(row) if own == choice), layer) for layer, row in enumerate(heads)]
        by_heads = sorted(((own, layer) for own, layer in by_layer if own), key=lambda each: (each[0], each[1]))
        for own, layers in groupby(by_heads, key=lambda each: each[0]):
            where = {"layers": spelled([layer for _, layer in layers])}
            if len(own) < len(heads[0]):
                where["heads"] = spelled(own)
            rows.append({**where, **_entry(choice, candidates, above)})
    return {"default": _entry(default, candidates, above), "rows": rows}


def _entry(
    choice: Choice, candidates: Mapping[Phase, Sequence[Candidate]], above: Mapping[Phase, Mapping[str, int]]
) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for phase, number in (("prefill", choice.prefill), ("decode", choice.decode)):
        candidate = candidates[phase][number]  # type: ignore[index]
        raw = candidate.backend.model_dump(mode="json", exclude_defaults=True)
        if least := above[phase].get(candidate.kind, 0):  # type: ignore[index]
            raw["above"] = least
        if raw["backend"] != "dense":
            entry[phase] = raw
    if choice.streams:
        window = candidates["prefill"][choice.prefill].window
        assert window is not None
        entry["keep"] = {"sink": window[0], "recent": window[1]}
    return entry


def spelled(numbers: Sequence[int]) -> str:
    """Ascending numbers as a policy file names them: "0-3, 7"."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda each: each[1] - each[0]):
        own = [number for _, number in run]
        parts.append(str(own[0]) if len(own) == 1 else f"{own[0]}-{own[-1]}")
    return ", ".join(parts)
