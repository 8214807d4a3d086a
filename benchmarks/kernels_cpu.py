"""The attention kernels on this machine's CPU against torch's own attention, side by side.

    python benchmarks/kernels_cpu.py [prefill] [sparse] [decode] [--dtype bfloat16] [--repeat 7]
        [--threads N] [--out benchmarks/results/kernels_cpu.json]

Each line compares calls that were made in turn, and reports the median of each and of the ratio within a round.
Prefill: a chunk on top of cached tokens, against one call of scaled_dot_product_attention (causal without cached
tokens, with the boolean mask that transformers builds otherwise). Sparse: the same with a share of the pages, as a
share of the dense time. Decode: against what transformers does in a layer and step, torch.cat of the cache and
scaled_dot_product_attention.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gossamer.kernels.layout import UNLIMITED, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.runs import list_pages
from gossamer.server.bench.provenance import provenance, write_report

HEADS, KV_HEADS, DIM, PAGE = 8, 4, 64, 64
TILE = 128 // (HEADS // KV_HEADS)  # 128 packed rows


def compare(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median milliseconds of each call, made in turn; and "ratio", the median of first / second within a round."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    first, second = list(calls)[:2]
    ratio = statistics.median(a / b for a, b in zip(times[first], times[second], strict=True))
    return {name: statistics.median(values) * 1e3 for name, values in times.items()} | {"ratio": ratio}


def paged(lengths: Sequence[int], dtype: torch.dtype, shuffled: bool) -> PagedKV:
    """Caches of random keys and values; physical pages ascending or in random order."""
    counts = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(counts)) if shuffled else torch.arange(sum(counts))
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    for row, (pages, count) in enumerate(zip(order.split(counts), counts, strict=True)):
        table[row, :count] = pages
    shape = (KV_HEADS, sum(counts), PAGE, DIM)
    return PagedKV(
        torch.randn(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        table,
        torch.tensor(lengths, dtype=torch.int32),
        torch.arange(KV_HEADS, dtype=torch.int32),
        torch.zeros(len(lengths), KV_HEADS, dtype=torch.int32),
        torch.full((len(lengths), KV_HEADS), UNLIMITED, dtype=torch.int32),
        HEADS // KV_HEADS,
    )


def one_chunk(past: int, chunk: int) -> QueryBlocks:
    rows = [BlockRow(0, p - past, p, min(TILE, past + chunk - p)) for p in range(past, past + chunk, TILE)]
    return QueryBlocks.of(TILE, rows)


def select(kv: PagedKV, blocks: QueryBlocks, density: float) -> SparseIndex:
    """Own pages, the first, and a share of the others at random, differently for each head and tile."""
    mask = torch.rand(KV_HEADS, len(blocks), kv.table.shape[1]) < density
    page = torch.arange(kv.table.shape[1])
    mask[..., 0] = True
    mask |= page >= (blocks.pos // PAGE)[:, None]
    mask &= page <= ((blocks.pos + blocks.count - 1) // PAGE)[:, None]
    return SparseIndex(*list_pages(mask))


def call(
    kernel: Callable[..., None], q: Tensor, kv: PagedKV, blocks: QueryBlocks, index: SparseIndex
) -> Callable[[], None]:
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    return lambda: kernel(q, kv, blocks, index, out, lse, scale=DIM**-0.5)


def prefill(dtype: torch.dtype, repeat: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for chunk, past in ((2048, 0), (8192, 0), (2048, 8192), (2048, 30720), (8192, 24576)):
        q = torch.randn(chunk, HEADS, DIM, dtype=dtype)
        k, v = (torch.randn(1, KV_HEADS, past + chunk, DIM, dtype=dtype) for _ in range(2))
        blocks = one_chunk(past, chunk)
        mask = torch.ones(chunk, past + chunk, dtype=torch.bool).tril(past)[None, None] if past else None
        query = q.transpose(0, 1)[None]

        def torch_own(q: Tensor = query, k: Tensor = k, v: Tensor = v, mask: Tensor | None = mask) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

        for shuffled in (False, True):
            kv = paged([past + chunk], dtype, shuffled)
            mine = call(paged_prefill, q, kv, blocks, select(kv, blocks, 1.0))
            found = compare({"ours": mine, "torch": torch_own}, max(3, repeat // (1 + past // 8192)))
            results.append({"what": "prefill", "chunk": chunk, "past": past, "shuffled": shuffled, **found})
            show(results[-1])
    return results


def sparse(dtype: torch.dtype, repeat: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for chunk, past in ((8192, 0), (4096, 12288), (2048, 30720)):
        q, kv, blocks = (
            torch.randn(chunk, HEADS, DIM, dtype=dtype),
            paged([past + chunk], dtype, False),
            one_chunk(past, chunk),
        )
        dense = call(paged_prefill, q, kv, blocks, select(kv, blocks, 1.0))
        for density in (0.5, 0.25, 0.1):
            index = select(kv, blocks, density)
            found = compare({"ours": call(paged_prefill, q, kv, blocks, index), "dense": dense}, max(3, repeat // 2))
            read = float(index.count.sum()) / float(select(kv, blocks, 1.0).count.sum())
            results.append({"what": "sparse", "chunk": chunk, "past": past, "pages": round(read, 3), **found})
            show(results[-1])
    return results


def decode(dtype: torch.dtype, repeat: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for batch, length in [(b, n) for n in (100, 1000, 4096, 32768) for b in (1, 4, 16)]:
        q = torch.randn(batch, HEADS, DIM, dtype=dtype)
        old = [torch.randn(batch, KV_HEADS, length - 1, DIM, dtype=dtype) for _ in range(2)]
        new = [torch.randn(batch, KV_HEADS, 1, DIM, dtype=dtype) for _ in range(2)]
        blocks = QueryBlocks.of(1, [BlockRow(b, b, length - 1, 1) for b in range(batch)])

        def theirs(q: Tensor = q, old: list[Tensor] = old, new: list[Tensor] = new) -> Tensor:
            k, v = (torch.cat(pair, 2) for pair in zip(old, new, strict=True))
            return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

        for shuffled in (False, True):
            kv = paged([length] * batch, dtype, shuffled)
            mine = call(paged_decode, q, kv, blocks, select(kv, blocks, 1.0))
            found = compare({"ours": mine, "transformers": theirs}, repeat * (3 if length < 32768 else 1))
            results.append({"what": "decode", "batch": batch, "length": length, "shuffled": shuffled, **found})
            show(results[-1])
    return results


def show(result: dict[str, object]) -> None:
    print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", default=["prefill", "sparse", "decode"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads torch may use; 1 where other work runs on the machine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = {"prefill": prefill, "sparse": sparse, "decode": decode}
    dtype = getattr(torch, options.dtype)
    results = [line for part in options.parts for line in parts[part](dtype, options.repeat)]
    capability = torch.backends.cpu.get_cpu_capability()
    found = {**provenance("cpu"), "capability": capability, "dtype": options.dtype, "results": results}
    write_report(options.out, found)


if __name__ == "__main__":
    main()
