"""Finds the fastest tiles of the kernels on this GPU, and writes them where the kernels look for them.

    python benchmarks/tune_kernels.py [--heads 32 8 128] [--length 32768] [--minutes 8] [--into configs/kernels]

For each kernel and case: the kernel's own tile against others, each timed alone by device events, the fastest three
again in turn. One is written down when it is at least 2 % faster and gives the same answer. A case that a file has already is
not tuned again, so that a run that was cut short goes on where it ended.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from provenance import provenance
from sparse_attention import Shape, cache_for, points
from torch import Tensor

from gossamer.attention.index import build_index
from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.selectors import BlockSparse, Budget, Dense, DoubleSparsity, Selector, VerticalSlash
from gossamer.attention.step import Span, plan_step
from gossamer.kernels.antidiagonal import antidiagonal_mass
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.score_pages import bound_mass, page_mass
from gossamer.kernels.score_tokens import label_mass
from gossamer.kernels.triton import tuned
from gossamer.kvcache.summaries import Labels

LEAST_GAIN = 1.02
ROUNDS = 9

Options = dict[str, int]


@dataclass(frozen=True)
class Case:
    """One call to make faster. `own`: what the kernel asks for by itself, noted while it runs."""

    name: str
    own: Options
    run: Callable[[], Tensor]


def candidates(own: Options) -> Iterator[Options]:
    """Other tiles than the kernel's own. Rows and columns never grow: they fit the shape already."""
    choices: dict[str, Sequence[int]] = {"num_warps": (4, 8), "num_stages": (1, 2, 3, 4, 5, 6)}
    if "per_sm" in own:
        choices["per_sm"] = (1, 2, 3, 4, 8)
    else:
        choices["M"] = [m for m in (16, 32, 64, 128) if own["M"] // 4 <= m <= own["M"]]
    if "COLUMNS" in own:
        choices["COLUMNS"] = [c for c in (32, 64, 128) if c <= 2 * own["COLUMNS"]]
    for values in product(*choices.values()):
        found = dict(zip(choices, values, strict=True))
        if any(own[name] != value for name, value in found.items()):
            yield found


def tune(case: Case, seconds: Callable[[Callable[[], Tensor]], float]) -> tuple[Options, float] | None:
    """The fastest options and how many times faster they are than the kernel's own; None where these are best."""
    with using({}):
        expected, plain = case.run(), seconds(case.run)
    tried = []
    for options in candidates(case.own):
        with using({case.name: options}):
            try:
                same = torch.allclose(case.run().float(), expected.float(), rtol=2e-2, atol=2e-2, equal_nan=True)
                tried.append((seconds(case.run), options, same))
            except Exception as error:  # registers, shared memory or the compiler itself: the next one, then
                print(f"  {options}: {type(error).__name__}", flush=True)
    best = sorted((entry for entry in tried if entry[2]), key=lambda entry: entry[0])[:3]
    gains = []
    for _, options, _ in best:
        times = []
        for _ in range(3):
            with using({}):
                plain = seconds(case.run)
            with using({case.name: options}):
                times.append(plain / seconds(case.run))
        gains.append((statistics.median(times), options))
    gain, options = max(gains, key=lambda entry: entry[0], default=(0.0, {}))
    return (options, round(gain, 4)) if gain >= LEAST_GAIN else None


def using(tiles: Mapping[str, Options]) -> Any:
    """Let the kernels find these tiles, whatever the device's file says."""
    return patch.object(tuned, "tiles_of", lambda device: tiles)


def device_seconds(run: Callable[[], Tensor]) -> float:
    """Median of several, by events on the device, on a cache that holds something else."""
    room = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    run()
    times = []
    for _ in range(ROUNDS):
        room.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def noted(run: Callable[[], Tensor]) -> Iterator[Case]:
    """The call as a case for each kernel in it that looks for a tile."""
    asked: dict[str, Options] = {}
    plain = tuned.tuned

    def note(kernel: str, tile: Options, device: torch.device, **about: int) -> Options:
        asked.setdefault(tuned.name_of(kernel, **about), dict(tile))
        return plain(kernel, tile, device, **about)

    modules = ("paged_prefill", "paged_decode", "score_pages", "antidiagonal")
    patches = [patch(f"gossamer.kernels.triton.{module}.tuned", note) for module in modules]
    for each in patches:
        each.start()
    try:
        run()
    finally:
        for each in patches:
            each.stop()
    for name, own in asked.items():
        yield Case(name, own, run)


def cases(shape: Shape, length: int, batch: int) -> Iterator[Case]:
    """Prompts of `length`, and a token of each of `batch` sequences of that length."""
    channels = torch.arange(16, device=shape.device).repeat(shape.kv_heads, 1).int()
    labels = Labels("noise", tuple(map(tuple, channels.tolist())), channels)
    selectors: list[Selector] = [BlockSparse(Budget("share", 0.1)), BlockSparse(Budget("share", 0.1), "bounds")]
    few = length // 20
    prefill: list[Selector] = [Dense(), selectors[0], VerticalSlash(few, few // 64)]
    decode: list[Selector] = [Dense(), selectors[0], DoubleSparsity(labels, 2048)]
    policy = AttentionPolicy("tuning", tuple(points(shape, [*selectors, *prefill, *decode])))
    cache, tables = cache_for(shape, policy, [length] * batch)
    for table in tables:
        cache.grow(table, length)
    for pool in cache.pools:
        for memory in (pool.k, pool.v, *pool.summaries.values()):
            memory.normal_()
    new = min(shape.chunk, length)
    for spans, chosen, kernel in (
        ([Span(length - new, new, length)], prefill, paged_prefill),
        ([Span(length - 1, 1, 0)] * batch, decode, paged_decode),
    ):
        step = plan_step(
            spans, cache.views(tables[: len(spans)]), policy.points[:1] * len(spans), shape.ratio, shape.device
        )
        (kv,), (blocks,) = step.views.layer(0), step.blocks
        q = shape.noise(sum(span.new for span in spans), shape.query_heads)
        for selector in chosen:
            yield from noted(_attention(kernel, selector, q, kv, blocks, shape.scale))
        for score in _scores(q, kv, blocks, labels, shape.scale):
            yield from noted(score)


def _attention(
    kernel: Callable[..., None], selector: Selector, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float
) -> Callable[[], Tensor]:
    index = build_index(selector.propose(q, kv, blocks, scale), kv, blocks)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)

    def run() -> Tensor:
        kernel(q, kv, blocks, index, out, lse, scale=scale)
        return out.clone()

    return run


def _scores(
    q: Tensor, kv: PagedKV, blocks: QueryBlocks, labels: Labels, scale: float
) -> Iterator[Callable[[], Tensor]]:
    means, bounds = kv.summaries["mean keys"], next(t for name, t in kv.summaries.items() if name.startswith("bounds"))
    yield lambda: page_mass(q, kv, blocks, means, scale=scale)
    yield lambda: bound_mass(q, kv, blocks, bounds, scale=scale)
    if blocks.size == 1:
        table = kv.summaries[labels.name]
        yield lambda: label_mass(q, kv, blocks, table, labels.of(kv), scale=scale)
    else:
        for stride in (8, 16):
            yield lambda stride=stride: antidiagonal_mass(q, kv, blocks, stride, scale=scale)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="query heads, KV heads, head size")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=16, help="sequences that generate")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no new case is begun")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent.parent / "configs" / "kernels")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("Tiles are tuned on a GPU, and torch sees none here.")
    torch.manual_seed(0)
    query_heads, kv_heads, dim = options.heads
    shape = Shape(query_heads, kv_heads, dim, torch.bfloat16, "cuda", 8192)
    file = options.into / tuned.file_name(torch.cuda.get_device_name())
    found: dict[str, Any] = {"tiles": {}, "gains": {}}
    if file.is_file():
        found = json.loads(file.read_text("utf-8"))
    began = time.monotonic()
    with torch.inference_mode():
        for case in cases(shape, options.length, options.batch):
            if case.name in found["gains"]:
                continue
            if time.monotonic() - began > 60 * options.minutes:
                print("out of time: call again to go on")
                break
            best = tune(case, device_seconds)
            found["gains"][case.name] = 1.0 if best is None else best[1]
            if best is not None:
                found["tiles"][case.name] = best[0]
            print(
                case.name, "keeps its own tile" if best is None else f"{best[1]} times faster by {best[0]}", flush=True
            )
            options.into.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(provenance() | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
