"""How near torch's own calls on a CPU come to the limit by bytes when generated tokens read 2,048 keys.

    python benchmarks/decode_floor.py --heads 32 8 128 --out benchmarks/results/decode_floor_8b_cpu.json

The least that any backend of ours does, written without us: no paging, no rules for windows, no shared launches, one
head layout. "attention": one call of torch's fused attention on keys that lie side by side, in another place each
round, as nothing that was just read lies in a cache. "copied": the same for 32 pages in chosen places, which are copied
first, since that call reads rows at one stride. "chosen": pages are scored by their mean keys first and the best are
taken. "tokens": single tokens as double sparsity reads them, by 16 channels of each key; which of them are best is not
even looked for, they are given. Dense is the same call on all keys. What each gains over it, as a share of what it
would gain if time went by the bytes read, is `of_limit`, as benchmarks/sparse_attention.py has it; all contestants run
in turn, and ratios are medians over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.kernels.layout import PAGE_SIZE
from gossamer.server.bench.layer import Shape
from gossamer.server.bench.provenance import provenance, write_report

BUDGET = 2048
PAGES = BUDGET // PAGE_SIZE
CHANNELS = 16  # that tokens are scored by
BYTES = 2  # of a bfloat16


class Floor:
    """A batch of sequences of one length in one layer, and the contestants. Keys and values [B * G, L, D]."""

    def __init__(self, shape: Shape, length: int, batch: int) -> None:
        self.rows, self.length, self.dim = batch * shape.kv_heads, length, shape.head_dim
        size = self.rows, length, self.dim
        self.k, self.v = torch.randn(size, dtype=torch.bfloat16), torch.randn(size, dtype=torch.bfloat16)
        self.means = self.k.unflatten(1, (-1, PAGE_SIZE)).float().mean(2).bfloat16()
        self.q = torch.randn(self.rows, shape.ratio, self.dim, dtype=torch.bfloat16)
        self.labels = self.k[..., :CHANNELS].contiguous()
        self.room = torch.empty(2, self.rows, BUDGET, self.dim, dtype=torch.bfloat16)
        self.first = torch.arange(self.rows)[:, None] * (length // PAGE_SIZE)
        self.round = 0

    def attend(self, k: Tensor, v: Tensor) -> None:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(self.q[:, None], k[:, None], v[:, None], scale=0.1)

    def dense(self) -> None:
        self.attend(self.k, self.v)

    def attention(self) -> None:
        begin = self.round * 7 % (self.length // BUDGET) * BUDGET
        self.attend(self.k[:, begin : begin + BUDGET], self.v[:, begin : begin + BUDGET])

    def copied(self, places: Tensor | None = None) -> None:
        """places [B * G, PAGES]"""
        if places is None:
            begin = self.round * 7 % (self.length // BUDGET)
            places = (torch.arange(PAGES) * (self.length // BUDGET) + begin).expand(self.rows, -1)
        at = (self.first + places).flatten()
        for keys, room in zip((self.k, self.v), self.room, strict=True):
            torch.index_select(keys.view(-1, PAGE_SIZE * self.dim), 0, at, out=room.view(len(at), -1))
        self.attend(self.room[0], self.room[1])

    def chosen(self) -> None:
        scores = torch.bmm(self.q, self.means.transpose(1, 2)).amax(1)
        self.copied(scores.topk(PAGES, sorted=False).indices)

    def tokens(self) -> None:
        torch.bmm(self.q[..., :CHANNELS], self.labels.transpose(1, 2)).amax(1)
        step = self.length // BUDGET
        given = torch.arange(BUDGET) * step + self.round * 7 % step
        at = (torch.arange(self.rows)[:, None] * self.length + given).flatten()
        for keys, room in zip((self.k, self.v), self.room, strict=True):
            torch.index_select(keys.view(-1, self.dim), 0, at, out=room.view(len(at), -1))
        self.attend(self.room[0], self.room[1])

    def sizes(self) -> dict[str, int]:
        """Bytes that each has to read."""
        token = 2 * self.rows * self.dim * BYTES
        few = BUDGET * token
        return {
            "dense": self.length * token,
            "attention": few,
            "copied": few,
            "chosen": few + self.means.numel() * BYTES,
            "tokens": few + self.labels.numel() * BYTES,
        }


def measure(floor: Floor, rounds: int) -> dict[str, list[float]]:
    """Seconds in each round, all in turn; the first round warms up."""
    contestants: dict[str, Callable[[], None]] = {
        "dense": floor.dense,
        "attention": floor.attention,
        "copied": floor.copied,
        "chosen": floor.chosen,
        "tokens": floor.tokens,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        floor.round = number
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def results(shape: Shape, length: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    floor = Floor(shape, length, batch)
    seconds, sizes = measure(floor, rounds), floor.sizes()
    found = []
    for name, own in seconds.items():
        faster = statistics.median(a / b for a, b in zip(seconds["dense"], own, strict=True))
        found.append(
            {
                "length": length,
                "batch": batch,
                "what": name,
                "seconds": round(statistics.median(own), 6),
                "times_faster": round(faster, 4),
                "of_limit": round(faster * sizes[name] / sizes["dense"], 4),
                "bytes": sizes[name],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, default=[8, 4, 64], metavar=("QUERY", "KV", "DIM"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = Shape(*options.heads, torch.bfloat16, "cpu")
    found = []
    with torch.inference_mode():
        for length in options.lengths:
            for batch in options.batches:
                found += results(shape, length, batch, options.rounds)
                for line in found[-5:]:
                    print(line)
    write_report(options.out, {**provenance("cpu"), "shape": options.heads, "results": found})


if __name__ == "__main__":
    main()
