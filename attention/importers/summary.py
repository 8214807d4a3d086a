"""What an imported policy covers, in numbers: for the command's table, and for the record of all published files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.attention.importers.policy_text import POINT
from gossamer.attention.policy_file import PolicyFile
from gossamer.attention.policy_view import view_point

LENGTHS = (32768, 131072)


@dataclass(frozen=True, slots=True)
class PhaseSummary:
    """Of one phase: heads by backend, and the mean nominal density in words by length."""

    phase: str
    backends: dict[str, int]
    density: dict[int, str]


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """Of the operating point that was imported."""

    heads: int
    sparse: int  # that read less than everything in some phase
    streaming: int
    phases: tuple[PhaseSummary, ...]


def summarise(file: PolicyFile, lengths: Sequence[int] = LENGTHS) -> ImportSummary:
    """What `imported` does, with densities at these lengths."""
    entries = [entry for row in file.entries(POINT) for entry, _ in row]
    sparse = sum(entry.keep != "all" or {entry.prefill.backend, entry.decode.backend} != {"dense"} for entry in entries)
    views = {length: view_point(file, POINT, length).panels for length in lengths}
    phases = []
    for number, panel in enumerate(views[lengths[0]]):
        backends: dict[str, int] = dict(Counter(str(cell.backend.backend) for cell in panel).most_common())
        density = {length: panels[number].mean() for length, panels in views.items()}
        phases.append(PhaseSummary(panel.phase, backends, density))
    return ImportSummary(len(entries), sparse, sum(entry.keep != "all" for entry in entries), tuple(phases))
