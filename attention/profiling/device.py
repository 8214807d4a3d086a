"""Measures what attention costs on this device: the micro-benchmark behind a device profile."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

import torch

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.index import build_index
from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.cost import Curve, DeviceProfile, PhaseCurves
from gossamer.attention.profiling.reading import Shape
from gossamer.attention.selectors import Selector
from gossamer.attention.selectors.base import CORRECTION
from gossamer.attention.step import TILE_ROWS
from gossamer.kernels.compact import compact
from gossamer.kernels.dropped_pages import add_dropped_pages
from gossamer.kernels.layout import PAGE_SIZE, UNLIMITED, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kvcache.summaries import FilledPages, Summary

CHUNK = 2048  # tokens of a prompt that are computed at once
BATCH = 4  # sequences that decode
READ = (2, 8, 32, 128)  # pages per block whose reading is timed
TOKENS = (64, 512, 2048)
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class _Layer:
    """Keys, values and queries of noise: a chunk at the end of a prompt, or the newest token of some sequences."""

    kv: PagedKV
    q: torch.Tensor
    blocks: QueryBlocks
    scale: float

    @property
    def shares(self) -> int:
        """Blocks times KV heads, over which a time is shared out."""
        return len(self.blocks) * self.kv.heads.numel()


def measure_device(
    shape: Shape,
    candidates: Mapping[Phase, Sequence[Candidate]],
    artefacts: Artefacts,
    lengths: Sequence[int],
    report: Callable[[str], None],
) -> DeviceProfile:
    """Time attention over noise, and one candidate of each kind, at two lengths or more."""
    curves: dict[Phase, PhaseCurves] = {}
    for phase, own in candidates.items():
        kinds = {each.kind: each.selector(shape.free[0], shape, artefacts) for each in own}
        choose: dict[str, list[tuple[float, float]]] = {}
        for length in sorted(lengths):
            layer = _noise(shape, phase, length, [s for each in kinds.values() for s in each.summaries])
            for kind, selector in kinds.items():
                if kind in ("dense", "sink-recent"):
                    continue
                report(f"{phase}: {kind} at {length} tokens")
                seen = length / PAGE_SIZE
                choose.setdefault(kind, []).append((seen, _time_choosing(layer, selector) / layer.shares))
        report(f"{phase}: attention")
        attend, tokens = _time_attending(layer)
        curves[phase] = PhaseCurves(
            attend=attend,
            tokens=tokens,
            choose={kind: Curve(points=tuple(points)) for kind, points in choose.items()},
        )
    return DeviceProfile(
        device=device_name(shape.device),
        dtype=str(shape.dtype).removeprefix("torch."),
        ratio=shape.ratio,
        head_dim=shape.head_dim,
        about={
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        },
        prefill=curves["prefill"],
        decode=curves["decode"],
    )


def device_name(device: torch.device) -> str:
    """As people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def _noise(shape: Shape, phase: Phase, length: int, summaries: Sequence[Summary]) -> _Layer:
    sequences = 1 if phase == "prefill" else BATCH
    pages, heads, device = length // PAGE_SIZE, shape.kv_heads, shape.device
    pool = (heads, sequences * pages, PAGE_SIZE, shape.head_dim)
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)

    table = torch.arange(sequences * pages, dtype=torch.int32, device=device).view(sequences, pages)
    sink = torch.zeros(sequences, heads, dtype=torch.int32, device=device)
    kv = PagedKV(
        noise(*pool),
        noise(*pool),
        table,
        torch.full((sequences,), length, dtype=torch.int32, device=device),
        torch.arange(heads, dtype=torch.int32, device=device),
        sink,
        torch.full_like(sink, UNLIMITED),
        shape.ratio,
        {
            each.name: torch.zeros(*pool[:2], *each.shape(PAGE_SIZE, shape.head_dim), device=device, dtype=shape.dtype)
            for each in summaries
        },
    )
    filled = FilledPages.of([(n, page) for n in range(sequences) for page in range(pages)], device)
    for each in dict.fromkeys(summaries):
        each.write(kv, filled)
    if phase == "prefill":
        size, first = max(1, TILE_ROWS // shape.ratio), max(0, length - CHUNK)
        rows = [BlockRow(0, at - first, at, min(size, length - at)) for at in range(first, length, size)]
        blocks = QueryBlocks.of(size, rows, device)
    else:
        blocks = QueryBlocks.of(1, [BlockRow(n, n, length - 1, 1) for n in range(sequences)], device)
    q = noise(sum(row.count for row in blocks.rows), shape.query_heads, shape.head_dim)
    return _Layer(kv, q, blocks, shape.head_dim**-0.5)


def _time_choosing(layer: _Layer, selector: Selector) -> float:
    """From the queries to the index, and the correction for dropped pages where there is one."""
    q, kv, blocks = layer.q, layer.kv, layer.blocks
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2], device=q.device)

    def choose() -> None:
        index = build_index(selector.propose(q, kv, blocks, layer.scale), kv, blocks)
        if selector.corrects:
            means = (kv.summaries[each.name] for each in CORRECTION)
            add_dropped_pages(q, kv, blocks, index, out, lse, *means, scale=layer.scale)

    return _seconds(choose, q.device)


def _time_attending(layer: _Layer) -> tuple[Curve, Curve]:
    """Against pages read, and what tokens add."""
    pages = layer.kv.table.shape[1]
    by_pages = []
    for read in sorted({min(read, pages) for read in READ}):
        by_pages.append((float(read), _seconds_of(layer, _index(layer, read)) / layer.shares))
    alone = _seconds_of(layer, _index(layer, 1))
    by_tokens = [(0.0, 0.0)]
    for tokens in sorted({min(count, (pages - 1) * PAGE_SIZE) for count in TOKENS}):
        more = _seconds_of(layer, _index(layer, 1, tokens)) - alone
        by_tokens.append((float(tokens), max(0.0, more) / layer.shares))
    return Curve(points=tuple(by_pages)), Curve(points=tuple(by_tokens))


def _index(layer: _Layer, pages: int, tokens: int = 0) -> SparseIndex:
    """So many pages for every block, its own the last of them; tokens anywhere in the pages before."""
    heads, blocks, width = layer.kv.heads.numel(), len(layer.blocks), layer.kv.table.shape[1]
    generator = torch.Generator().manual_seed(1)
    own = (layer.blocks.pos.cpu() // PAGE_SIZE).tolist()
    mask = torch.zeros(heads, blocks, width, dtype=torch.bool)
    for n, last in enumerate(own):
        mask[:, n, last] = True
        for g in range(heads):
            mask[g, n, torch.randperm(max(1, last), generator=generator)[: pages - 1]] = True
    index = SparseIndex(*compact(mask.to(layer.q.device)))
    if not tokens:
        return index
    some = torch.randperm(max(1, min(own)) * PAGE_SIZE, generator=generator)[:tokens].sort().values.int()
    flat = some.repeat(heads * blocks).to(layer.q.device)
    count = torch.full((heads, blocks), len(some), dtype=torch.int32, device=layer.q.device)
    start = (torch.arange(heads * blocks, dtype=torch.int32, device=layer.q.device) * len(some)).view(heads, blocks)
    return SparseIndex(index.start, index.count, index.pages, start, count, flat)


def _seconds_of(layer: _Layer, index: SparseIndex) -> float:
    out = torch.empty_like(layer.q)
    lse = torch.empty(layer.q.shape[:2], dtype=torch.float32, device=layer.q.device)
    attend = paged_decode if layer.blocks.size == 1 else paged_prefill

    def run() -> None:
        attend(layer.q, layer.kv, layer.blocks, index, out, lse, scale=layer.scale)

    return _seconds(run, layer.q.device)


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """Median of some rounds, after one that warms up."""
    taken = []
    for _ in range(ROUNDS + 1):
        began = _now(device)
        call()
        taken.append(_now(device) - began)
    return median(taken[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
