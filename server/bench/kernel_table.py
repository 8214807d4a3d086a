"""The kernel table: every operation on this device, against the device's own ceilings and against dense attention."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from gossamer.server.bench.clock import race
from gossamer.server.bench.kernel_contestants import DENSE, Contestant, decode, prefill
from gossamer.server.bench.layer import Layer, Shape
from gossamer.server.bench.work import Ceilings

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    shape: Shape
    lengths: tuple[int, ...]
    batch: int  # sequences that decode
    share: float  # of the keys that a prompt reads
    tokens: int  # that a generated token reads
    rounds: int


@dataclass(frozen=True)
class Row:
    """One operation at one length."""

    op: str
    phase: Phase
    length: int
    batch: int
    density: float | None  # share of the causal (query, key) pairs that is read
    seconds: float  # median
    operations: float
    bytes: float
    roofline_seconds: float
    roofline_share: float  # 1: as fast as the device's ceilings allow
    times_dense: float  # how many of it take as long as our dense attention; above 1 is faster


class OutOfMemory(Exception):
    """What was asked for is larger than the device."""


def measure(settings: Settings, ceilings: Ceilings, report: Callable[[str], None]) -> Iterator[Row]:
    """Lengths and phases in turn; within one, every operation once per round."""
    for length in settings.lengths:
        for phase in ("prefill", "decode"):
            report(f"{phase} at {length}")
            try:
                yield from _rows(settings, phase, length, ceilings, report)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                raise OutOfMemory(f"{phase} at {length} does not fit in the device's memory") from error


@torch.inference_mode()
def _rows(
    settings: Settings, phase: Phase, length: int, ceilings: Ceilings, report: Callable[[str], None]
) -> list[Row]:
    batch = 1 if phase == "prefill" else settings.batch
    layer = Layer(settings.shape, batch, length)
    if phase == "prefill":
        contestants = prefill(layer, settings.share, report)
    else:
        contestants = decode(layer, settings.tokens, report)
    device = settings.shape.device
    times = race({each.op: each.call for each in contestants}, settings.rounds, device, 1 if device == "cpu" else 2)
    return [_row(each, times[each.op], times[DENSE], phase, layer, ceilings) for each in contestants]


def _row(
    own: Contestant,
    times: Sequence[float],
    dense: Sequence[float],
    phase: Phase,
    layer: Layer,
    ceilings: Ceilings,
) -> Row:
    seconds, least = statistics.median(times), ceilings.seconds(own.work)
    return Row(
        own.op,
        phase,
        layer.length,
        layer.batch,
        None if own.density is None else round(own.density, 4),
        float(f"{seconds:.4g}"),
        own.work.operations,
        own.work.bytes,
        float(f"{least:.4g}"),
        float(f"{least / seconds:.4g}"),
        float(f"{statistics.median(a / b for a, b in zip(dense, times, strict=True)):.4g}"),
    )


def summary(settings: Settings, ceilings: Ceilings, rows: Sequence[Row]) -> dict[str, object]:
    """For the JSON file, beside the provenance."""
    shape = settings.shape
    return {
        "shape": {
            "heads": [shape.query_heads, shape.kv_heads, shape.head_dim],
            "dtype": str(shape.dtype).removeprefix("torch."),
            "device": shape.device,
        },
        "share": settings.share,
        "tokens": settings.tokens,
        "rounds": settings.rounds,
        "ceilings": {
            "operations_per_second": float(f"{ceilings.operations:.4g}"),
            "bytes_per_second": float(f"{ceilings.bandwidth:.4g}"),
        },
        "results": [asdict(row) for row in rows],
    }


def print_table(settings: Settings, ceilings: Ceilings, rows: Sequence[Row], device: str, console: Console) -> None:
    """One line per operation; what the columns mean is below."""
    shape = settings.shape
    console.print(
        f"{device}: {ceilings.operations / 1e12:.3g} TFLOP/s, {ceilings.bandwidth / 1e9:.4g} GB/s (measured); "
        f"{shape.query_heads} query and {shape.kv_heads} KV heads of {shape.head_dim}, "
        f"{str(shape.dtype).removeprefix('torch.')}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("op", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for name in ("density", "time", "of roofline", "x dense"):
        table.add_column(name, justify="right", no_wrap=True)
    before = (rows[0].phase, rows[0].length) if rows else None
    for row in rows:
        if (row.phase, row.length) != before:
            table.add_section()
            table.add_row()
            before = row.phase, row.length
        table.add_row(
            row.op,
            f"{row.phase} {f'{row.batch} x ' if row.phase == 'decode' else ''}{row.length}",
            "" if row.density is None else f"{row.density:.1%}",
            _time(row.seconds),
            _percent(row.roofline_share),
            f"{row.times_dense:.3g}" if row.times_dense < 1000 else f"{row.times_dense:.0f}",
        )
    console.print(table)
    console.print(
        "of roofline: the least time for its operations and bytes, at the device's measured ceilings, over the time "
        "taken; x dense: the time of our dense attention over the time taken.",
        highlight=False,
    )


def _time(seconds: float) -> str:
    unit, size = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if seconds >= pair[1]), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.01 else f"{share * 100:.1g}%"
