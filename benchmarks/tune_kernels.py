"""Finds the fastest tiles of the kernels on this GPU, and writes them where the kernels look for them.

    python benchmarks/tune_kernels.py [--heads 32 8 128] [--length 32768] [--minutes 7] [--out FILE]

For each kernel and case: the kernel's own tile against others, each timed alone by device events, the fastest three
again in turn. One is written down when it is at least 2 % faster and gives the same answer. A case that the
file has already is not tuned again, so that a run that was cut short goes on where it ended.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gossamer.attention.index import build_index
from gossamer.attention.selectors.base import Proposal
from gossamer.attention.selectors.budget import Budget
from gossamer.kernels.antidiagonal import antidiagonal_mass
from gossamer.kernels.layout import QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.score_pages import bound_mass, page_mass
from gossamer.kernels.score_tokens import label_mass
from gossamer.kernels.triton import tuned
from gossamer.kernels.triton.tiles import capability, register_limit
from gossamer.kvcache.summaries import KeyBounds
from gossamer.server.bench.clock import race
from gossamer.server.bench.layer import Layer, Shape
from gossamer.server.bench.provenance import provenance, write_report

LEAST_GAIN = 1.02
WRONG = 0.02  # of the answer: twice what rounding to bfloat16 does to it
ROUNDS = 9

Options = dict[str, int]


@dataclass(frozen=True)
class Case:
    """One call to make faster. `own`: what the kernel asks for by itself, noted while it runs, and the most rows that
    it has."""

    name: str
    own: Options
    run: Callable[[], Tensor]


def candidates(own: Options) -> Iterator[Options]:
    """Other tiles than the kernel's own. Rows and columns never grow beyond what the call has."""
    choices: dict[str, Sequence[int]] = {"num_warps": (4, 8), "num_stages": (1, 2, 3, 4, 5, 6)}
    if "TMA" in own:
        descriptors = (0, 1) if capability(torch.device("cuda")) >= 90 else (0,)
        choices |= {"num_stages": (2, 3, 4, 5), "TMA": descriptors, "per_sm": (1, 2)}
    elif "per_sm" in own:
        choices["per_sm"] = (1, 2, 3, 4, 8)
    if "TMA" in own or "per_sm" not in own:
        least, most = max(own["M"] // 2, own.get("HEADS", 1)), own.get("most", own["M"])
        choices["M"] = [m for m in (16, 32, 64, 128) if least <= m <= most]
    if "COLUMNS" in own:
        choices["COLUMNS"] = [c for c in (32, 64, 128) if c <= 2 * own["COLUMNS"]]
    for values in product(*choices.values()):
        found = dict(zip(choices, values, strict=True))
        idle = "TMA" in own and found["per_sm"] > 1 and not register_limit(found["per_sm"], found["num_warps"])
        if not idle and any(own[name] != value for name, value in found.items()):
            yield found


def tune(
    case: Case, seconds: Callable[[Callable[[], Tensor]], float], ends: float = math.inf
) -> tuple[Options, float] | None:
    """The fastest options and how many times faster they are than the kernel's own; None where these are best. Raises
    TimeoutError when the clock is past `ends`."""
    with using({}):
        expected = case.run()
    tried = []
    for options in candidates(case.own):
        if time.monotonic() > ends:
            raise TimeoutError
        with using({case.name: options}):
            try:
                if difference(case.run(), expected) < WRONG:
                    tried.append((seconds(case.run), options))
            except Exception as error:  # registers, shared memory or the compiler itself: the next one, then
                print(f"  {options}: {type(error).__name__}", flush=True)
    best = sorted(tried, key=lambda entry: entry[0])[:3]
    gains = []
    for _, options in best:
        times = []
        for _ in range(3):
            with using({}):
                plain = seconds(case.run)
            with using({case.name: options}):
                times.append(plain / seconds(case.run))
        gains.append((statistics.median(times), options))
    gain, options = max(gains, key=lambda entry: entry[0], default=(0.0, {}))
    return (options, round(gain, 4)) if gain >= LEAST_GAIN else None


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the size of what is expected; infinite where something was not written."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return math.inf if error.isnan() else float(error)


def using(tiles: Mapping[str, Options]) -> Any:
    """Let the kernels find these tiles, whatever the device's file says."""
    return patch.object(tuned, "tiles_of", lambda device: tiles)


def device_seconds(run: Callable[[], Tensor]) -> float:
    """Median of several."""
    return statistics.median(race({"": run}, ROUNDS, "cuda", warm_up=1)[""])


def noted(run: Callable[[], Tensor]) -> Iterator[Case]:
    """The call as a case for each kernel in it that looks for a tile."""
    asked: dict[str, Options] = {}
    plain = tuned.tuned

    def note(kernel: str, tile: Options, device: torch.device, *, most: int | None = None, **about: int) -> Options:
        asked.setdefault(tuned.name_of(kernel, **about), tile | ({} if most is None else {"most": most}))
        return plain(kernel, tile, device, most=most, **about)

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
    """A prompt of `length`, and a token of each of `batch` sequences of that length."""
    for layer, prompts in ((Layer(shape, batch, length), False), (Layer(shape, 1, length), True)):
        blocks = layer.prompts() if prompts else layer.newest()
        q = layer.queries(blocks)
        for call in (*_attention(layer, q, blocks), *_scores(layer, q, blocks)):
            yield from noted(call)


def _attention(layer: Layer, q: Tensor, blocks: QueryBlocks) -> Iterator[Callable[[], Tensor]]:
    """A tenth of the pages, and a tenth of them beside as many single tokens; for generated tokens each beside dense,
    which prompts hand over to torch."""
    kernel = paged_decode if blocks.size == 1 else paged_prefill
    mask, pages = layer.sparse(blocks, layer.masses(blocks), Budget("share", 0.1))
    few = torch.randint(layer.length, (*mask.shape[:2], layer.length // 10), device=q.device)
    tokens = build_index(Proposal(mask, few.sort(-1).values.int()), layer.kv, blocks)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)

    def run(*indices: SparseIndex) -> Tensor:
        found = []
        for index in indices:
            out.fill_(float("nan"))
            kernel(q, layer.kv, blocks, index, out, lse, scale=layer.shape.scale)
            found.append(out.clone())
        return torch.stack(found)

    for index in (pages, tokens):
        yield partial(run, index, layer.dense(blocks)) if blocks.size == 1 and index is pages else partial(run, index)


def _scores(layer: Layer, q: Tensor, blocks: QueryBlocks) -> Iterator[Callable[[], Tensor]]:
    kv, scale, stretches = layer.kv, layer.shape.scale, KeyBounds()
    keys = kv.k.unflatten(2, (-1, stretches.tokens))
    yield partial(page_mass, q, kv, blocks, kv.k.mean(2), scale=scale)
    yield partial(bound_mass, q, kv, blocks, torch.stack((keys.amin(3), keys.amax(3)), 3), scale=scale)
    if blocks.size == 1:
        channels = layer.shape.labels().on_device
        labels = kv.k.gather(3, channels.long()[:, None, None].expand(-1, *kv.k.shape[1:3], -1))
        yield partial(label_mass, q, kv, blocks, labels, channels, scale=scale)
    else:
        for stride in (8, 16):
            yield partial(antidiagonal_mass, q, kv, blocks, stride, scale=scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="query heads, KV heads, head size")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=16, help="sequences that generate")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which it ends")
    parser.add_argument("--out", type=Path, help="instead of the file in configs/kernels; what either holds is kept")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("Tiles are tuned on a GPU, and torch sees none here.")
    torch.manual_seed(0)
    query_heads, kv_heads, dim = options.heads
    shape = Shape(query_heads, kv_heads, dim, torch.bfloat16, "cuda")
    known = Path(__file__).parent.parent / "configs" / "kernels" / tuned.file_name(torch.cuda.get_device_name())
    file = options.out or known
    file.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"tiles": {}, "gains": {}}
    for held in (known, file):
        if held.is_file():
            before = json.loads(held.read_text("utf-8"))
            found = {name: found[name] | before[name] for name in found}
    ends = time.monotonic() + 60 * options.minutes
    with torch.inference_mode():
        for case in cases(shape, options.length, options.batch):
            if case.name in found["gains"]:
                continue
            try:
                best = tune(case, device_seconds, ends)
            except TimeoutError:
                print(f"out of time in {case.name}: call again to go on")
                raise SystemExit(3) from None
            found["gains"][case.name] = 1.0 if best is None else best[1]
            if best is not None:
                found["tiles"][case.name] = best[0]
            print(
                case.name, "keeps its own tile" if best is None else f"{best[1]} times faster by {best[0]}", flush=True
            )
            write_report(file, found | provenance())


if __name__ == "__main__":
    main()
