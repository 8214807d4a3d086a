"""Dense attention over pages against torch's scaled_dot_product_attention on tensors side by side, on this machine.

    python benchmarks/dense_attention.py --lengths 8192 32768 131072 --out benchmarks/results/dense_attention_X.json

A layer of an 8B model: 32 query heads, 8 KV heads of 128, bfloat16. Prefill: a whole prompt, causal. Decode: one query
for each sequence. "ours" reads pages in random places with an index that names them all; "handed over" copies the pages
side by side first (kernels/dense_prefill.py); the others are torch's back ends, which find keys and values side by side
already. Contestants run in turn; ratios are medians within rounds, above 1 where ours is faster. A back end that does
not know the shape on this machine is left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, write_report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.kernels.compact import compact
from gossamer.kernels.dense_prefill import chunks, dense_prefill
from gossamer.kernels.layout import PAGE_SIZE, UNLIMITED, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
TILE_ROWS = 128  # query heads of a KV head x positions in a tile

Contestants = dict[str, Callable[[], object]]


class Layer:
    """Keys and values of `batch` sequences of `length` tokens, in pages and side by side."""

    def __init__(self, heads: tuple[int, int, int], batch: int, length: int, device: str) -> None:
        self.query_heads, kv_heads, self.dim = heads
        self.batch, self.length, self.device, self.ratio = batch, length, device, self.query_heads // kv_heads
        pages = -(-length // PAGE_SIZE)
        self.k, self.v = (
            torch.randn(batch, kv_heads, pages * PAGE_SIZE, self.dim, dtype=torch.bfloat16, device=device)
            for _ in range(2)
        )
        order = torch.randperm(batch * pages, device=device)
        pools = []
        for whole in (self.k, self.v):
            flat = whole.unflatten(2, (pages, PAGE_SIZE)).transpose(0, 1).flatten(1, 2)  # [G, B * L, S, D]
            pool = torch.empty_like(flat)
            pool[:, order] = flat
            pools.append(pool)
        limits = torch.zeros(2, batch, kv_heads, dtype=torch.int32, device=device)
        limits[1] = UNLIMITED
        self.kv = PagedKV(
            *pools,
            order.view(batch, pages).int(),
            torch.full((batch,), length, dtype=torch.int32, device=device),
            torch.arange(kv_heads, dtype=torch.int32, device=device),
            *limits,
            self.ratio,
        )

    def whole(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def queries(self, tokens: int) -> Tensor:
        """[tokens, H, D]"""
        return torch.randn(tokens, self.query_heads, self.dim, dtype=torch.bfloat16, device=self.device)

    def dense(self, blocks: QueryBlocks) -> SparseIndex:
        """Every page up to each block's last."""
        last = blocks.pos + blocks.count - 1
        page = torch.arange(self.kv.table.shape[1], device=self.device)
        mask = (page * PAGE_SIZE <= last[:, None]).expand(self.kv.heads.numel(), -1, -1)
        return SparseIndex(*compact(mask.contiguous()))


def prefill(layer: Layer) -> Contestants:
    """One sequence's whole prompt."""
    size, length, scale = TILE_ROWS // layer.ratio, layer.length, layer.dim**-0.5
    rows = [BlockRow(0, first, first, min(size, length - first)) for first in range(0, length, size)]
    blocks = QueryBlocks.of(size, rows, layer.device)
    q, index = layer.queries(length), layer.dense(blocks)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=layer.device)
    ((chunk, _),) = chunks(blocks)
    calls: Contestants = {
        "ours": lambda: paged_prefill(q, layer.kv, blocks, index, out, lse, scale=scale),
        "handed over": lambda: dense_prefill(q, layer.kv, chunk, out, scale=scale),
    }
    side = q.transpose(0, 1)[None]
    return calls | torchs(lambda: sdpa(side, *layer.whole(), causal=True), layer.device)


def decode(layer: Layer) -> Contestants:
    """One more token for every sequence."""
    rows = [BlockRow(n, n, layer.length - 1, 1) for n in range(layer.batch)]
    blocks = QueryBlocks.of(1, rows, layer.device)
    q, index = layer.queries(layer.batch), layer.dense(blocks)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=layer.device)
    calls: Contestants = {
        "ours": lambda: paged_decode(q, layer.kv, blocks, index, out, lse, scale=layer.dim**-0.5),
    }
    return calls | torchs(lambda: sdpa(q[:, :, None], *layer.whole(), causal=False), layer.device)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def torchs(call: Callable[[], Tensor], device: str) -> Contestants:
    """The call under each of torch's back ends that takes it; on a CPU torch chooses."""
    if device == "cpu":
        return {"torch": call}
    calls: Contestants = {}
    for name, backend in BACKENDS.items():

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return call()

        try:
            run()
        except RuntimeError as refused:
            print(f"{name} does not take it: {str(refused).splitlines()[0]}")
        else:
            calls[name] = run
    return calls


def race(calls: Contestants, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of each, and how many times as long as ours it takes."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            wait(device)
            began = time.perf_counter()
            call()
            wait(device)
            if number > 1:
                times[name].append(time.perf_counter() - began)
    return {
        name: {
            "seconds": round(statistics.median(own), 7),
            "times_ours": round(statistics.median(a / b for a, b in zip(own, times["ours"], strict=True)), 4),
        }
        for name, own in times.items()
    }


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="of sequences that decode")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="query heads, KV heads, head size")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for length in options.lengths:
            for what, batch in (("prefill", 1), *(("decode", batch) for batch in options.batches)):
                layer = Layer(tuple(options.heads), batch, length, device)
                calls = prefill(layer) if what == "prefill" else decode(layer)
                found = race(calls, options.rounds, device)
                results.append({"what": what, "length": length, "batch": batch, "contestants": found})
                print(what, length, batch, found, flush=True)
                del layer, calls
    shape = {"heads": options.heads, "dtype": "bfloat16"}
    write_report(options.out, {**provenance(), "shape": shape, "results": results})


if __name__ == "__main__":
    main()
