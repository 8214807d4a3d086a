"""Measures what attention costs on this device: the micro-benchmark behind a device profile."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from random import Random
from statistics import median
from typing import TypeVar

import torch

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.index import build_index
from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.cost import CHUNK
from gossamer.attention.profiling.device_times import FREE, Curve, DeviceProfile, PhaseTimes, Timing
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

CHUNKS = (CHUNK // 4, CHUNK)  # tokens of a prompt that are computed at once, and
BATCHES = (1, 4)  # sequences that decode: few and many, to tell what a call costs from what its blocks add
READ = (2, 8, 32, 128)  # pages per block whose reading is timed
TOKENS = (64, 512, 2048)
WARM, ROUNDS = 1, 15
K = TypeVar("K")


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
    times = {phase: _measure_phase(shape, phase, own, artefacts, lengths, report) for phase, own in candidates.items()}
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
        prefill=times["prefill"],
        decode=times["decode"],
    )


def _measure_phase(
    shape: Shape,
    phase: Phase,
    candidates: Sequence[Candidate],
    artefacts: Artefacts,
    lengths: Sequence[int],
    report: Callable[[str], None],
) -> PhaseTimes:
    kinds = {each.kind: each.selector(shape.free[0], shape, artefacts) for each in candidates}
    choosing = {kind: partial(_choosing, selector=selector) for kind, selector in kinds.items() if kind not in FREE}
    dense: list[tuple[float, _Pair]] = []
    choose: dict[str, list[tuple[float, _Pair]]] = {kind: [] for kind in choosing}
    for length in sorted(lengths):
        layers = _noise(shape, phase, length, [s for each in kinds.values() for s in each.summaries])
        pages = length // PAGE_SIZE
        report(f"{phase}: dense attention, and {len(choosing)} ways of choosing, at {length} tokens")
        found = _measure(layers, {**choosing, "dense": partial(_attending, read=pages)})
        dense.append((pages, found.pop("dense")))
        for kind, pair in found.items():
            choose[kind].append((pages, pair))
    report(f"{phase}: attention to what was chosen")
    attend = _measure(layers, {read: partial(_attending, read=read) for read in READ if read < pages})
    return PhaseTimes(
        dense=_timing(dense),
        attend=_timing(list(attend.items())),
        tokens=_measure_tokens(layers),
        choose={kind: _timing(own) for kind, own in choose.items()},
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """Seconds for few and for many shares: blocks times KV heads."""

    few: float
    many: float
    shares: tuple[int, int]

    @property
    def call(self) -> float:
        """What is left when there is nothing to share."""
        few, many = self.shares
        return max(0.0, (self.few * many - self.many * few) / (many - few))


def _timing(measured: Sequence[tuple[float, _Pair]]) -> Timing:
    """Against sizes. One call for all of them, the least that was found; the rest is what blocks add."""
    call = min(pair.call for _, pair in measured)
    points = tuple((float(size), max(0.0, pair.many - call) / pair.shares[1]) for size, pair in measured)
    return Timing(call=call, each=Curve(points=points))


def _measure_tokens(layers: Sequence[_Layer]) -> Curve:
    """What single tokens add to one page, for one head and block."""
    most = (layers[-1].kv.table.shape[1] - 1) * PAGE_SIZE
    works = {count: partial(_attending, read=1, tokens=count) for count in (0, *(min(n, most) for n in TOKENS))}
    found = _measure(layers[-1:], works)
    alone = found[0].many
    return Curve(points=tuple((float(n), max(0.0, pair.many - alone) / pair.shares[1]) for n, pair in found.items()))


def _measure(layers: Sequence[_Layer], works: Mapping[K, Callable[[_Layer], Callable[[], None]]]) -> dict[K, _Pair]:
    """Medians of some rounds, each of all works in another order, so that what disturbs one disturbs all."""
    calls = {(name, n): work(layer) for name, work in works.items() for n, layer in enumerate(layers)}
    taken: dict[tuple[K, int], list[float]] = {key: [] for key in calls}
    rng, order = Random(0), list(calls)
    for _ in range(WARM + ROUNDS):
        rng.shuffle(order)
        for key in order:
            began = _now(layers[0].q.device)
            calls[key]()
            taken[key].append(_now(layers[0].q.device) - began)
    last, shares = len(layers) - 1, (layers[0].shares, layers[-1].shares)
    return {name: _Pair(median(taken[name, 0][WARM:]), median(taken[name, last][WARM:]), shares) for name in works}


def device_name(device: torch.device) -> str:
    """As people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def _noise(shape: Shape, phase: Phase, length: int, summaries: Sequence[Summary]) -> tuple[_Layer, _Layer]:
    """With few blocks and with many, over the same keys."""
    sequences = 1 if phase == "prefill" else BATCHES[-1]
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
    few, many = (_queries(shape, phase, length, n, noise) for n in (0, 1))
    return _Layer(kv, *few, shape.head_dim**-0.5), _Layer(kv, *many, shape.head_dim**-0.5)


def _queries(
    shape: Shape, phase: Phase, length: int, number: int, noise: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, QueryBlocks]:
    """Of CHUNKS[number] tokens at the end of a prompt, or the newest ones of BATCHES[number] sequences."""
    if phase == "prefill":
        size, first = max(1, TILE_ROWS // shape.ratio), max(0, length - CHUNKS[number])
        rows = [BlockRow(0, at - first, at, min(size, length - at)) for at in range(first, length, size)]
        blocks = QueryBlocks.of(size, rows, shape.device)
    else:
        blocks = QueryBlocks.of(1, [BlockRow(n, n, length - 1, 1) for n in range(BATCHES[number])], shape.device)
    return noise(sum(row.count for row in blocks.rows), shape.query_heads, shape.head_dim), blocks


def _choosing(layer: _Layer, selector: Selector) -> Callable[[], None]:
    """From the queries to the index, and the correction for dropped pages where there is one."""
    q, kv, blocks = layer.q, layer.kv, layer.blocks
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2], device=q.device)

    def choose() -> None:
        index = build_index(selector.propose(q, kv, blocks, layer.scale), kv, blocks)
        if selector.corrects:
            means = (kv.summaries[each.name] for each in CORRECTION)
            add_dropped_pages(q, kv, blocks, index, out, lse, *means, scale=layer.scale)

    return choose


def _attending(layer: _Layer, read: int, tokens: int = 0) -> Callable[[], None]:
    """So many pages for every block, or all that it may see, and so many single tokens."""
    index = _index(layer, read, tokens)
    out = torch.empty_like(layer.q)
    lse = torch.empty(layer.q.shape[:2], dtype=torch.float32, device=layer.q.device)
    attend = paged_decode if layer.blocks.size == 1 else paged_prefill
    return partial(attend, layer.q, layer.kv, layer.blocks, index, out, lse, scale=layer.scale)


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
