"""Every operation of kernels/ once, on small tensors, against its plain-torch twin on the CPU.

    python benchmarks/one_of_each_kernel.py [NAME ...] [--device cpu] [--dtype float32] [--out FILE]

Small enough to run under compute-sanitizer. Exit 1 when one differs. The error is the norm of the difference over the
norm of the twin's result; masks and indices have to be equal. On a CPU the twins are compared with themselves, which
shows that the cases can be called.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from gossamer.attention.index import build_index
from gossamer.attention.selectors.base import Proposal
from gossamer.attention.step import TILE_ROWS
from gossamer.kernels import page_summaries
from gossamer.kernels.antidiagonal import antidiagonal_mass
from gossamer.kernels.choose import Kind, choose_pages, choose_tokens
from gossamer.kernels.dense_prefill import chunks, dense_prefill
from gossamer.kernels.dropped_pages import add_dropped_pages
from gossamer.kernels.fp8 import quantise
from gossamer.kernels.gates import gate_queries
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.probe import probe_mass
from gossamer.kernels.rotary import Rotary
from gossamer.kernels.runs import readable_runs
from gossamer.kernels.score_pages import bound_mass, page_mass
from gossamer.kernels.score_tokens import label_mass
from gossamer.kernels.store import store
from gossamer.server.bench.layer import Shape, paged
from gossamer.server.bench.provenance import provenance, write_report

LENGTHS = (500, 270)  # of the sequences; the first ends inside a page, the second just behind one
WINDOW = 100
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}  # tf32 is as coarse as float16
Value = TypeVar("Value")


def moved(value: Value, device: str) -> Value:
    """The same on the device: a tensor, or a frozen value of tensors."""
    if isinstance(value, Tensor):
        return value.to(device)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: moved(getattr(value, each.name), device) for each in fields(value)})
    return value


@dataclass(frozen=True)
class Queries:
    """Prompts in tiles, or one token of each sequence, with a selection of pages and single tokens."""

    q: Tensor
    blocks: QueryBlocks
    mask: Tensor
    proposed: Tensor  # single tokens
    pages: SparseIndex
    both: SparseIndex


@dataclass(frozen=True)
class Inputs:
    """Everything that the cases read."""

    kv: PagedKV
    windowed: PagedKV
    prompts: Queries
    tokens: Queries
    new_k: Tensor
    new_v: Tensor
    masses: Tensor
    physical: Tensor
    first: Tensor
    channels: Tensor
    sinks: Tensor
    scale: float


def inputs(dtype: torch.dtype, dim: int) -> Inputs:
    """On the CPU: four query heads, two KV heads, one of which has a window."""
    torch.manual_seed(0)
    shape = Shape(4, 2, dim, dtype, "cpu")
    kv = paged(shape, LENGTHS)
    window, sink = kv.window.clone(), kv.sink.clone()
    window[:, 1], sink[:, 1] = WINDOW, 3
    windowed = replace(kv, window=window, sink=sink)
    size = TILE_ROWS // shape.ratio
    tiles = [
        BlockRow(seq, sum(LENGTHS[:seq]) + first, first, min(size, length - first))
        for seq, length in enumerate(LENGTHS)
        for first in range(0, length, size)
    ]
    single = [BlockRow(seq, seq, length - 1, 1) for seq, length in enumerate(LENGTHS)]
    prompts, tokens = (queries(shape, windowed, QueryBlocks.of(*of)) for of in ((size, tiles), (1, single)))
    full = [(seq, page) for seq, length in enumerate(LENGTHS) for page in range(length // PAGE_SIZE)]
    seq, page = torch.tensor(full).T
    return Inputs(
        kv,
        windowed,
        prompts,
        tokens,
        shape.noise(sum(LENGTHS), 2),
        shape.noise(sum(LENGTHS), 2),
        torch.rand(2, 5, 300),
        kv.table[seq, page],
        (page * PAGE_SIZE).int(),
        shape.labels().on_device,
        torch.randn(4),
        shape.scale,
    )


def queries(shape: Shape, kv: PagedKV, blocks: QueryBlocks) -> Queries:
    mask = torch.rand(2, len(blocks), kv.table.shape[1]) < 0.4
    chosen = torch.randint(0, min(LENGTHS), (2, len(blocks), 40), dtype=torch.int32).sort(-1).values
    pages = build_index(Proposal(mask), replace(kv, window=torch.full_like(kv.window, 2**30)), blocks)
    both = build_index(Proposal(mask, chosen), kv, blocks)
    q = shape.noise(sum(row.count for row in blocks.rows), shape.query_heads)
    return Queries(q, blocks, mask, chosen, pages, both)


Results = tuple[Tensor, ...]


def attended(kernel: Callable[..., None], given: Inputs, asked: Queries, options: bool) -> Results:
    """Pages alone; or pages and tokens through a window, with a soft cap and sinks."""
    out, lse = torch.full_like(asked.q, torch.nan), torch.full(asked.q.shape[:2], torch.nan, device=asked.q.device)
    kv, index = (given.windowed, asked.both) if options else (given.kv, asked.pages)
    more: dict[str, Any] = {"softcap": 5.0, "sinks": given.sinks} if options else {}
    kernel(asked.q, kv, asked.blocks, index, out, lse, scale=given.scale, **more)
    return out, lse


def by_descriptors(given: Inputs) -> Results:
    """Whole pages through tensor descriptors, on a GPU that has them; single tokens beside them as ever."""
    if not given.kv.k.is_cuda:
        return attended(paged_prefill, given, given.prompts, True)
    from gossamer.kernels.triton import paged_prefill as form

    plain = form.tuned
    with patch.object(form, "tuned", lambda *asked, **case: {**plain(*asked, **case), "TMA": 1}):
        return attended(paged_prefill, given, given.prompts, True)


def corrected(given: Inputs) -> Results:
    asked = given.prompts
    out, lse = attended(paged_prefill, given, asked, False)
    means = given.kv.k.mean(2), given.kv.v.mean(2)
    add_dropped_pages(asked.q, given.kv, asked.blocks, asked.pages, out, lse, *means, scale=given.scale)
    return out, lse


def handed_over(given: Inputs) -> Results:
    out = torch.full_like(given.prompts.q, torch.nan)
    for chunk, _ in chunks(given.prompts.blocks):
        dense_prefill(given.prompts.q, given.kv, chunk, out, scale=given.scale)
    return (out,)


def stored(given: Inputs) -> Results:
    scale = None if given.kv.scale is None else given.kv.scale.clone()
    kv = replace(given.kv, k=given.kv.k.clone(), v=given.kv.v.clone(), scale=scale)
    store(given.new_k, given.new_v, kv, given.prompts.blocks)
    return (kv.k, kv.v) if scale is None else (kv.k.float(), kv.v.float(), scale)


def as_fp8(given: Inputs) -> Inputs:
    """The same with keys and values that are kept as FP8."""
    (k, keys), (v, values) = quantise(given.kv.k), quantise(given.kv.v)
    kept = {"k": k, "v": v, "scale": torch.stack((keys, values))}
    return replace(given, kv=replace(given.kv, **kept), windowed=replace(given.windowed, **kept))


def gated(x: Inputs) -> Results:
    """A gate's queries, as long as a head, from weights that are the keys of the first pages."""
    dim, ratio, device = x.kv.k.shape[3], x.kv.ratio, x.kv.k.device
    weight = x.kv.k.flatten(1, 2)[:, : ratio * dim, None].transpose(1, 2)
    rotary = Rotary(1e4 ** -(torch.arange(dim // 2, device=device) * 2 / dim))
    return (gate_queries(x.tokens.q, x.kv, x.tokens.blocks, weight, weight[0, 0, 0].float(), rotary, rotary),)


def chosen(x: Inputs, given: Queries, kind: Kind, value: float) -> Results:
    mass = x.masses[:, :1, : x.kv.table.shape[1]].expand(-1, len(given.blocks), -1)
    return (choose_pages(mass, x.kv, given.blocks, kind=kind, value=value, least=80, recent=70),)


def listed(x: Inputs, given: Queries) -> Results:
    """The runs one behind the other: where they begin means nothing."""
    index = readable_runs(given.mask, given.proposed, x.windowed, given.blocks)
    assert index.tokens is not None and index.token_start is not None and index.token_count is not None
    lists = (index.start, index.count, index.pages), (index.token_start, index.token_count, index.tokens)
    found: list[Tensor] = []
    for start, count, values in lists:
        every = zip(start.flatten().tolist(), count.flatten().tolist(), strict=True)
        found += [count, torch.cat([values[first : first + length] for first, length in every])]
    return tuple(found)


def bounds_of(kv: PagedKV) -> Tensor:
    stretches = kv.k.unflatten(2, (4, -1))
    return torch.stack((stretches.amin(3), stretches.amax(3)), 3)


def labels_of(given: Inputs) -> Tensor:
    at = given.channels.long()[:, None, None].expand(-1, *given.kv.k.shape[1:3], -1)
    return given.kv.k.gather(3, at)


def summary(given: Inputs, name: str, *shape: int) -> Results:
    """The table, 0 where no page is full."""
    kind, scale = torch.float32 if name == "pools" else given.prompts.q.dtype, given.kv.key_scale
    out = torch.zeros(*given.kv.k.shape[:2], *shape, dtype=kind, device=given.kv.k.device)
    if name == "labels":
        page_summaries.page_labels(given.kv.k, given.physical, given.channels, out, scale)
    elif name == "pools":
        half = given.kv.k.shape[3] // 2
        inv_freq = 10000.0 ** -(torch.arange(half, device=out.device) / half)
        page_summaries.page_pools(given.kv.k, given.physical, given.first, inv_freq, 1.0, out, scale)
    else:
        kernel = page_summaries.page_means if name == "means" else page_summaries.page_bounds
        kernel(given.kv.k, given.physical, out, scale)
    return (out,)


def scored(kernel: Callable[..., Any], given: Inputs, asked: Queries, *more: Any) -> Results:
    found = kernel(asked.q, given.kv, asked.blocks, *more, scale=given.scale)
    return found if isinstance(found, tuple) else (found,)


def cases(dim: int) -> dict[str, Callable[[Inputs], Results]]:
    few = dim // 4
    of_fp8: dict[str, Callable[[Inputs], Results]] = {
        "paged_prefill_of_fp8": lambda x: attended(paged_prefill, as_fp8(x), x.prompts, False),
        "paged_prefill_with_options_of_fp8": lambda x: attended(paged_prefill, as_fp8(x), x.prompts, True),
        "paged_decode_of_fp8": lambda x: attended(paged_decode, as_fp8(x), x.tokens, False),
        "paged_decode_with_options_of_fp8": lambda x: attended(paged_decode, as_fp8(x), x.tokens, True),
        "dense_prefill_of_fp8": lambda x: handed_over(as_fp8(x)),
        "store_as_fp8": lambda x: stored(as_fp8(x)),
        "antidiagonal_mass_of_fp8": lambda x: scored(antidiagonal_mass, as_fp8(x), x.prompts, 16),
        "probe_mass_of_fp8": lambda x: scored(probe_mass, as_fp8(x), x.prompts, 64),
        "page_means_of_fp8": lambda x: summary(as_fp8(x), "means", dim),
        "page_bounds_of_fp8": lambda x: summary(as_fp8(x), "bounds", 4, 2, dim),
        "page_labels_of_fp8": lambda x: summary(as_fp8(x), "labels", PAGE_SIZE, few),
        "page_pools_of_fp8": lambda x: summary(as_fp8(x), "pools", 3, dim),
    }
    return of_fp8 | {
        "paged_prefill": lambda x: attended(paged_prefill, x, x.prompts, False),
        "paged_prefill_with_options": lambda x: attended(paged_prefill, x, x.prompts, True),
        "paged_prefill_by_descriptors": by_descriptors,
        "paged_decode": lambda x: attended(paged_decode, x, x.tokens, False),
        "paged_decode_with_options": lambda x: attended(paged_decode, x, x.tokens, True),
        "dense_prefill": handed_over,
        "add_dropped_pages": corrected,
        "store": stored,
        "page_mass": lambda x: scored(page_mass, x, x.prompts, x.kv.k.mean(2)),
        "page_mass_of_tokens": lambda x: scored(page_mass, x, x.tokens, x.kv.k.mean(2)),
        "bound_mass": lambda x: scored(bound_mass, x, x.tokens, bounds_of(x.kv)),
        "label_mass": lambda x: scored(label_mass, x, x.tokens, labels_of(x), x.channels),
        "gates": gated,
        "antidiagonal_mass_8": lambda x: scored(antidiagonal_mass, x, x.prompts, 8),
        "antidiagonal_mass_16": lambda x: scored(antidiagonal_mass, x, x.prompts, 16),
        "probe_mass": lambda x: scored(probe_mass, x, x.prompts, 64),
        "choose_pages_by_count": lambda x: chosen(x, x.prompts, "tokens", 200),
        "choose_pages_by_share": lambda x: chosen(x, x.tokens, "share", 0.4),
        "choose_pages_by_mass": lambda x: chosen(x, x.prompts, "mass", 0.8),
        "choose_pages_by_part": lambda x: chosen(x, x.tokens, "part", 0.5),
        "choose_pages_by_weight": lambda x: chosen(x, x.tokens, "weight", 0.5),
        "choose_tokens": lambda x: (choose_tokens(x.masses, 70, 0.1),),
        "runs": lambda x: listed(x, x.prompts),
        "runs_of_tokens": lambda x: listed(x, x.tokens),
        "page_means": lambda x: summary(x, "means", dim),
        "page_bounds": lambda x: summary(x, "bounds", 4, 2, dim),
        "page_labels": lambda x: summary(x, "labels", PAGE_SIZE, few),
        "page_pools": lambda x: summary(x, "pools", 3, dim),
    }


def error(found: Results, expected: Results) -> float:
    """The largest relative difference; infinite where shapes, indices or NaNs differ."""
    worst = 0.0
    for mine, theirs in zip((x.cpu() for x in found), expected, strict=True):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return float("inf")
        if not theirs.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(mine, theirs) else float("inf"))
        elif not bool(mine.isfinite().all()):
            return float("inf")
        else:
            difference = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)
            worst = max(worst, float(difference))
    return worst


def compare(
    case: Callable[[Inputs], Results], here: Inputs, there: Inputs, tolerance: float
) -> tuple[bool, float | str]:
    """Whether the case does there what it does here, and how far off it is or what it said."""
    expected = case(here)
    try:
        off = error(case(there), expected)
    except Exception as reason:
        return False, f"{type(reason).__name__}: {str(reason)[:500]}"
    return off <= tolerance, off if math.isfinite(off) else "shapes, indices or NaNs differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all when left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    every = cases(options.dim)
    if unknown := [name for name in options.names if name not in every]:
        parser.error(f"there is no {unknown[0]}; there are: {', '.join(every)}")
    results, wrong = [], []
    with torch.inference_mode():
        here = inputs(dtype, options.dim)
        there = moved(here, options.device)
        for name in options.names or every:
            right, said = compare(every[name], here, there, TOLERANCE[dtype])
            wrong += [] if right else [name]
            results.append({"kernel": name, "right": right, "error": said})
            print(f"{name:34} {'right' if right else 'WRONG'}  {said}", flush=True)
    about = {"shape": {"heads": [4, 2, options.dim], "dtype": options.dtype, "lengths": LENGTHS}}
    write_report(options.out, {**provenance(options.device), **about, "wrong": wrong, "results": results})
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
