"""What calibration found, added up over documents: each candidate's error, recall and density for every head."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.calibrate import Tables
from gossamer.attention.profiling.device_times import Reads

FIELDS = ("error", "norm", "recall", "queries", "read", "possible", "singles")


@dataclass(frozen=True, slots=True)
class Found:
    """One phase at one length: error [C, layers, G], squared and relative to the layer's attention output behind the
    projection; recall and density [C, layers, G]; singles [C, layers, G], what of the density is read as single tokens;
    spread [C, layers, G], the standard deviation of the errors' roots over documents."""

    error: Tensor
    recall: Tensor
    density: Tensor
    singles: Tensor
    spread: Tensor

    def reads(self, candidate: int, layer: int, head: int) -> Reads:
        return Reads(float(self.density[candidate, layer, head]), float(self.singles[candidate, layer, head]))


def flatten(tables: Mapping[Phase, Tables]) -> dict[str, Tensor]:
    """By name, as a file has them."""
    return {f"{phase}.{name}": getattr(own, name) for phase, own in tables.items() for name in FIELDS}


def unflatten(flat: Mapping[str, Tensor]) -> dict[Phase, Tables]:
    """The other way round."""
    return {phase: Tables(*(flat[f"{phase}.{name}"] for name in FIELDS)) for phase in PHASES}


def add_up(documents: Iterable[Tables]) -> Found:
    """Errors are relative per document and region, and their mean is taken, so that no document with large activations
    drowns the others; density is over all queries."""
    errors, recalls, reads, singles, possible = [], [], [], [], []
    for each in documents:
        asked = each.queries > 0
        norm = each.norm[:, asked].clamp(min=torch.finfo(torch.float64).tiny)
        errors.append((each.error[..., asked] / norm[None, :, None]).mean(-1))
        recalls.append((each.recall[..., asked] / each.queries[asked]).mean(-1))
        reads.append(each.read)
        singles.append(each.singles)
        possible.append(each.possible)
    error = torch.stack(errors)
    whole = torch.stack(possible).sum(0).clamp(min=1)
    density, single = (torch.stack(own).sum(0) / whole for own in (reads, singles))
    spread = error.sqrt().std(0, correction=0)
    return Found(error.mean(0), torch.stack(recalls).mean(0), density.clamp(max=1), single, spread)
