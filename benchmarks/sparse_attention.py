"""The attention of one layer under every backend, against dense, on this machine: prompts, generated tokens, overhead.

    python benchmarks/sparse_attention.py [prefill] [decode] [short] --out benchmarks/results/sparse_attention_cpu.json

Queries, keys and values are noise, which no selector finds easy, at the shape of the packaged demo model (8 query
heads, 4 KV heads of 64) or another. All backends run on the same cache within a round, in turn, and ratios are medians
over rounds. "given": the kernel alone, with its index; "selected": with the selection and with writing the page
summaries that it needs. "of_limit": what a generated token gains over dense, as a share of what it would gain if time
went by the bytes read (keys, values, summaries). On a CPU what torch's own calls reach stands beside it
(benchmarks/decode_floor.py). On a GPU every part waits for the device.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from decode_floor import Floor
from torch import Tensor, nn

from gossamer.attention.attend import attend
from gossamer.attention.index import build_index
from gossamer.attention.policy import AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import (
    BlockSparse,
    Budget,
    Dense,
    DoubleSparsity,
    LearnedGate,
    Selector,
    SinkRecent,
    VerticalSlash,
)
from gossamer.attention.step import Span, Step, plan_step
from gossamer.kernels.dropped_pages import add_dropped_pages
from gossamer.kernels.layout import PAGE_SIZE, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.rotary import Rotary
from gossamer.kernels.store import store
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll
from gossamer.kvcache.summaries import GateKeys, MeanKeys, MeanValues
from gossamer.kvcache.table import PageTable
from gossamer.server.bench.ceilings import read_bandwidth
from gossamer.server.bench.clock import now
from gossamer.server.bench.layer import Shape
from gossamer.server.bench.provenance import provenance, write_report

CHUNK = {"cpu": 2048, "cuda": 8192}  # prompt tokens of a step


@dataclass
class Times:
    """Seconds of one contestant in each round, and what it read of what it could."""

    select: list[float] = field(default_factory=list)  # with the summaries
    given: list[float] = field(default_factory=list)
    read: float = 0.0
    possible: float = 0.0

    @property
    def density(self) -> float:
        return self.read / self.possible

    @property
    def totals(self) -> list[float]:
        return [a + b for a, b in zip(self.select, self.given, strict=True)]


def gate(shape: Shape, phase: str, budget: Budget) -> LearnedGate:
    """Random weights: one gate query per KV head, as wide as a head."""
    wide, device = shape.head_dim, shape.device
    rotary = Rotary(10000.0 ** -(torch.arange(wide // 2, device=device) * 2 / wide))
    keys = GateKeys(
        f"noise {phase}", 0, torch.randn(shape.kv_heads, 1, 3 * wide, wide, device=device), None, rotary, rotary
    )
    query = torch.randn(shape.kv_heads, 1, shape.ratio * wide, wide, device=device)
    return LearnedGate(keys, budget, query, None, phase)


def prefill_backends(shape: Shape, share: float, length: int) -> dict[str, Selector]:
    """Every backend for prompts, set to read about `share` of the keys; a diagonal crosses two pages of a block."""
    budget, few = Budget("share", share), int(length * share / 2)
    return {
        "dense": Dense(),
        "sink-recent": SinkRecent(64, max(64, few)),
        "block-sparse mean": BlockSparse(budget),
        "block-sparse mean, corrected": BlockSparse(budget, corrects=True),
        "block-sparse antidiagonal 16": BlockSparse(budget, "antidiagonal", 16),
        "block-sparse antidiagonal 8": BlockSparse(budget, "antidiagonal", 8),
        "vertical-slash": VerticalSlash(few, few // (2 * PAGE_SIZE)),
        "vertical-slash mass": VerticalSlash(few, few // (2 * PAGE_SIZE), mass=0.9),
        "learned-gate": gate(shape, "prefill", budget),
    }


def decode_backends(shape: Shape, tokens: int) -> dict[str, Selector]:
    """Every backend for generated tokens, reading `tokens` keys."""
    budget = Budget("tokens", tokens)
    return {
        "dense": Dense(),
        "sink-recent": SinkRecent(64, tokens - 64),
        "block-sparse mean": BlockSparse(budget),
        "block-sparse bounds": BlockSparse(budget, "bounds"),
        "double-sparsity": DoubleSparsity(shape.labels(), tokens),
        "learned-gate": gate(shape, "decode", budget),
    }


def points(shape: Shape, selectors: Sequence[Selector]) -> list[OperatingPoint]:
    """One per selector, of one layer whose heads all have it for both phases."""
    return [
        OperatingPoint(str(n), ((HeadPolicy(selector, selector, KeepAll()),) * shape.kv_heads,))
        for n, selector in enumerate(selectors)
    ]


def cache_for(shape: Shape, policy: AttentionPolicy, lengths: Sequence[int]) -> tuple[KVCache, list[PageTable]]:
    groups = group_heads(policy.rules())
    pages = sum(-(-length // PAGE_SIZE) + 1 for length in lengths)
    cache = KVCache(
        groups,
        [pages] * len(groups),
        ratio=shape.ratio,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        device=shape.device,
        summaries=policy.summaries(),
    )
    return cache, [cache.table([KeepAll()] * len(groups), b"") for _ in lengths]


@dataclass
class Race:
    """Contestants on one cache of one layer."""

    shape: Shape
    selectors: dict[str, Selector]
    times: dict[str, Times] = field(default_factory=dict)

    def begin(self) -> None:
        for name in self.selectors:
            times = self.times.setdefault(name, Times())
            times.select.append(0.0)
            times.given.append(0.0)

    def write(self, kv: PagedKV, step: Step) -> None:
        """Each summary once; its time counts for everyone who needs it."""
        spent: dict[str, float] = {}
        for name, selector in self.selectors.items():
            for summary in selector.summaries if step.filled is not None else ():
                if summary.name not in spent:
                    began = now(self.shape.device)
                    summary.write(kv, step.filled)  # type: ignore[arg-type]
                    spent[summary.name] = now(self.shape.device) - began
                self.times[name].select[-1] += spent[summary.name]

    def run(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, skip: frozenset[str] = frozenset()) -> None:
        """Every contestant once, in turn."""
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        kernel = paged_decode if blocks.size == 1 else paged_prefill
        scale = self.shape.scale
        for name, selector in self.selectors.items():
            if name in skip:
                continue
            times, began = self.times[name], now(self.shape.device)
            index = build_index(selector.propose(q, kv, blocks, scale), kv, blocks)
            chosen = now(self.shape.device)
            kernel(q, kv, blocks, index, out, lse, scale=scale)
            if selector.corrects:
                means = (kv.summaries[each.name] for each in (MeanKeys(), MeanValues()))
                add_dropped_pages(q, kv, blocks, index, out, lse, *means, scale=scale)
            done = now(self.shape.device)
            times.select[-1] += chosen - began
            times.given[-1] += done - chosen
            times.read += pages_read(index, blocks)
            times.possible += sum(
                kv.heads.numel() * -(-(row.pos + row.count) // PAGE_SIZE) * row.count for row in blocks.rows
            )


def pages_read(index: SparseIndex, blocks: QueryBlocks) -> float:
    """Queries x heads x pages; a single token is a part of a page."""
    pages = index.count.float()
    if index.token_count is not None:
        pages = pages + index.token_count / PAGE_SIZE
    return float((pages * blocks.count).sum())


def prefill(shape: Shape, length: int, share: float, rounds: int) -> list[dict[str, Any]]:
    """A prompt in chunks, each chunk under every backend in turn."""
    race = Race(shape, prefill_backends(shape, share, length))
    policy = AttentionPolicy("race", tuple(points(shape, list(race.selectors.values()))))
    for number in range(rounds + 1):
        if number <= 1:
            race.times.clear()  # the first round warms up
        race.begin()
        cache, (table,) = cache_for(shape, policy, [length])
        for first in range(0, length, CHUNK[shape.device]):
            new = min(CHUNK[shape.device], length - first)
            cache.grow(table, new)
            step = plan_step(
                [Span(first, new, length)], cache.views([table]), policy.points[:1], shape.ratio, shape.device
            )
            (kv,) = step.views.layer(0)
            assert step.prefill is not None
            q, k, v = (shape.noise(new, heads) for heads in (shape.query_heads, shape.kv_heads, shape.kv_heads))
            store(k, v, kv, step.prefill)
            race.write(kv, step)
            race.run(q, kv, step.prefill)
            if number == 0 and first >= 2 * CHUNK[shape.device]:
                break
        cache.drop(table)
    return [{"what": "prefill", "length": length, "backend": name, **summary(race, name)} for name in race.selectors]


def summary(race: Race, name: str) -> dict[str, Any]:
    """Ratios to dense within a round: above 1 is faster than dense."""
    dense, own = race.times["dense"], race.times[name]
    return {
        "density": round(own.density, 4),
        "seconds": round(statistics.median(own.totals), 6),
        "times_faster_given": ratio(dense.totals, own.given),
        "times_faster_selected": ratio(dense.totals, own.totals),
        "selection_share": ratio(own.select, own.totals),
    }


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(first, second, strict=True)), 4)


def decode(shape: Shape, length: int, batch: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One generated token for each of `batch` sequences, again and again."""
    race = Race(shape, decode_backends(shape, tokens))
    policy = AttentionPolicy("race", tuple(points(shape, list(race.selectors.values()))))
    cache, tables = cache_for(shape, policy, [length] * batch)
    race.begin()
    for table in tables:
        for first in range(0, length - 1, 8192):
            new = min(8192, length - 1 - first)
            cache.grow(table, new)
            step = plan_step(
                [Span(first, new, length)], cache.views([table]), policy.points[:1], shape.ratio, shape.device
            )
            (kv,) = step.views.layer(0)
            assert step.prefill is not None
            store(shape.noise(new, shape.kv_heads), shape.noise(new, shape.kv_heads), kv, step.prefill)
            race.write(kv, step)
    for table in tables:
        cache.grow(table, 1)
    spans = [Span(length - 1, 1, 1)] * batch
    step = plan_step(spans, cache.views(tables), policy.points[:1] * batch, shape.ratio, shape.device)
    (kv,) = step.views.layer(0)
    assert step.decode is not None
    q = shape.noise(batch, shape.query_heads)
    store(shape.noise(batch, shape.kv_heads), shape.noise(batch, shape.kv_heads), kv, step.decode)
    race.run(q, kv, step.decode)
    race.times.clear()
    by_labels = next(each for each in race.selectors.values() if isinstance(each, DoubleSparsity)).labels
    floor = Floor(q, kv, length, tokens, by_labels) if shape.device == "cpu" else None
    bare: dict[str, list[float]] = {}
    for number in range(rounds):
        race.begin()
        race.run(q, kv, step.decode)
        if floor is not None:
            floor.round = number
            for name, call in floor.contestants().items():
                began = now(shape.device)
                call()
                bare.setdefault(name, []).append(now(shape.device) - began)
    bandwidth = read_bandwidth(shape.device)
    sizes: dict[str, int] = {}
    results = []
    for name, selector in race.selectors.items():
        keys = batch * (length if name == "dense" else tokens)
        size = keys * shape.kv_heads * shape.head_dim * 2 * q.element_size()
        for each in selector.summaries:
            size += kv.summaries[each.name].numel() * kv.summaries[each.name].element_size()
        sizes[name], own = size, summary(race, name)
        limit = {
            "of_limit": round(own["times_faster_selected"] * size / sizes["dense"], 4),  # 1: as fast by byte as dense
            "of_bandwidth": round(size / bandwidth / statistics.median(race.times[name].totals), 4),
            "bytes": size,
        }
        results.append({"what": "decode", "length": length, "batch": batch, "backend": name, **own, **limit})
    for name, seconds in bare.items() if floor is not None else ():
        faster, size = ratio(race.times["dense"].totals, seconds), floor.size(name)
        bounds = {"times_faster": faster, "of_limit": round(faster * size / sizes["dense"], 4), "bytes": size}
        line = {"what": "decode by torch alone", "length": length, "batch": batch, "backend": name}
        results.append({**line, "seconds": round(statistics.median(seconds), 6), **bounds})
    return results


def short(shape: Shape, length: int, rounds: int) -> list[dict[str, Any]]:
    """What a policy costs a prompt that is too short for it: the whole of `attend`, against a dense policy."""
    selector = BlockSparse(Budget("share", 0.125), above=2 * length)
    seconds: dict[str, list[float]] = {"dense": [], "below": []}
    for number in range(rounds + 1):
        for name in seconds:
            policy = AttentionPolicy("race", tuple(points(shape, [Dense() if name == "dense" else selector])))
            taken = attend_seconds(shape, policy, length)
            if number:
                seconds[name].append(taken)
    times = ratio(seconds["below"], seconds["dense"])
    return [{"what": "short", "length": length, "backend": "block-sparse mean", "time_to_dense": times}]


def attend_seconds(shape: Shape, policy: AttentionPolicy, length: int) -> float:
    """A prompt through one layer, with everything that `attend` does."""
    cache, (table,) = cache_for(shape, policy, [length])
    module = nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    spent = 0.0
    for first in range(0, length, CHUNK[shape.device]):
        new = min(CHUNK[shape.device], length - first)
        cache.grow(table, new)
        q, k, v = (shape.noise(new, heads) for heads in (shape.query_heads, shape.kv_heads, shape.kv_heads))
        began = now(shape.device)
        step = plan_step([Span(first, new, length)], cache.views([table]), policy.points[:1], shape.ratio, shape.device)
        attend(module, *(x.transpose(0, 1)[None] for x in (q, k, v)), None, step=step, scaling=shape.scale)
        spent += now(shape.device) - began
    cache.drop(table)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["prefill", "decode", "short"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768], help="of prompts")
    parser.add_argument("--decode-lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--share", type=float, default=0.125, help="of the keys that prompts read")
    parser.add_argument("--tokens", type=int, default=2048, help="that a generated token reads")
    parser.add_argument("--heads", type=int, nargs=3, default=[8, 4, 64], help="query heads, KV heads, head size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query_heads, kv_heads, dim = options.heads
    shape = Shape(query_heads, kv_heads, dim, torch.bfloat16, device)
    runs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "prefill": lambda: [
            line for length in options.lengths for line in prefill(shape, length, options.share, options.rounds)
        ],
        "decode": lambda: [
            line
            for length in options.decode_lengths
            for batch in options.batches
            for line in decode(shape, length, batch, options.tokens, 7 * options.rounds)
        ],
        "short": lambda: short(shape, 8192, 5 * options.rounds),
    }
    results = []
    with torch.inference_mode():
        for part in options.parts:
            for line in runs[part]():
                results.append(line)
                print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    found = {**provenance(), "shape": {"heads": options.heads, "dtype": "bfloat16"}, "results": results}
    write_report(options.out, found)


if __name__ == "__main__":
    main()
