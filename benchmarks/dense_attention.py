"""Dense attention over pages against torch's scaled_dot_product_attention on tensors side by side, on this machine.

    python benchmarks/dense_attention.py --lengths 8192 32768 131072 --out benchmarks/results/dense_attention_X.json

A layer of an 8B model: 32 query heads, 8 KV heads of 128, bfloat16. Prefill: a whole prompt, causal. Decode: one query
for each sequence. "ours" reads pages in random places with an index that names them all; those that a prompt can be
"handed to" (kernels/dense_prefill.py) copy the pages side by side first, but for FlashAttention-3; the others, torch's
back ends and flash-attn where it is installed, find keys and values side by side already. Contestants run in turn, on a
GPU with an empty cache and between two events; ratios are medians within rounds, above 1 where ours is faster. A back
end that does not know the shape on this machine is left out.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gossamer.kernels.dense_prefill import chunks, dense_prefill, ways
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.server.bench.clock import Calls, race
from gossamer.server.bench.layer import Layer, Shape
from gossamer.server.bench.peers import flash_attns, sdpa, torchs
from gossamer.server.bench.provenance import provenance, write_report


def prefill(layer: Layer) -> Calls:
    """One sequence's whole prompt."""
    blocks, device, scale = layer.prompts(), layer.shape.device, layer.shape.scale
    q, index = layer.queries(blocks), layer.dense(blocks)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    ((chunk, _),) = chunks(blocks)
    calls: Calls = {"ours": lambda: paged_prefill(q, layer.kv, blocks, index, out, lse, scale=scale)}
    for way in ways(q, layer.kv):
        calls[f"handed to {way}"] = partial(dense_prefill, q, layer.kv, chunk, out, scale=scale, way=way)
    side, whole = q.transpose(0, 1)[None], layer.whole
    calls |= torchs(lambda: sdpa(side, *whole, causal=True), device, print)
    return calls | flash_attns(side, *whole, causal=True, refused=print)


def decode(layer: Layer) -> Calls:
    """One more token for every sequence."""
    blocks, device, scale = layer.newest(), layer.shape.device, layer.shape.scale
    q, index = layer.queries(blocks), layer.dense(blocks)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    calls: Calls = {"ours": lambda: paged_decode(q, layer.kv, blocks, index, out, lse, scale=scale)}
    single, whole = q[:, :, None], layer.whole
    calls |= torchs(lambda: sdpa(single, *whole, causal=False), device, print)
    return calls | flash_attns(single, *whole, causal=False, refused=print)


def contest(calls: Calls, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of each, and how many times as long as ours it takes."""
    times = race(calls, rounds, device)
    return {
        name: {
            "seconds": round(statistics.median(own), 7),
            "times_ours": round(statistics.median(a / b for a, b in zip(own, times["ours"], strict=True)), 4),
        }
        for name, own in times.items()
    }


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
                layer = Layer(Shape(*options.heads, torch.bfloat16, device), batch, length)
                calls = prefill(layer) if what == "prefill" else decode(layer)
                found = contest(calls, options.rounds, device)
                results.append({"what": what, "length": length, "batch": batch, "contestants": found})
                print(what, length, batch, found, flush=True)
                del layer, calls
    shape = {"heads": options.heads, "dtype": "bfloat16"}
    write_report(options.out, {**provenance(), "shape": shape, "results": results})


if __name__ == "__main__":
    main()
