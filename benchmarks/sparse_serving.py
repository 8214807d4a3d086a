"""Whole requests under sparse operating points against dense ones: time to first token, and time per token after it.

    python benchmarks/sparse_serving.py --points dense gossamer-demo-mixed:fast --lengths 32768 \
        --out benchmarks/results/sparse_serving_cpu.json

The demo model through the real engine. In every round each point answers one prompt of random tokens, in turn; ratios
are to dense, round by round, above 1 when faster. Prompts longer than the model's positions are for time alone: the
model is told that it has as many.

    python benchmarks/sparse_serving.py --shape 8b --lengths 32768 131072 --decode 32768x1 32768x8 8192x32 --out FILE

Random weights in the shape of an 8B model, dense and sparse (--share of the pages of prompts, --budget keys of a
generated token). --decode LENGTHxBATCH: time per token while BATCH sequences, each with a prompt of its own, generate
together.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from demo_engine import start
from dummy_model import SHAPES, write_dummy_model
from sparse_points import chosen_points, shaped_points

from gossamer.attention.policy import AttentionPolicy
from gossamer.server.bench.provenance import provenance, write_report
from gossamer.server.config import DEMO_MODEL, ServerConfig
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.request import AttentionUse, Delta, Event, Request, SamplingParams, Started

SPARE = 2048  # tokens that a sequence may generate while others still compute their prompts


@dataclass
class Run:
    """One request: when it began, when its prompt was done, when each token came, when it ended."""

    began: float
    started: float = 0.0
    ended: float = 0.0
    use: AttentionUse | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    tokens: list[float] = field(default_factory=list)
    failed: str | None = None

    def publish(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started = time.perf_counter()
            self.ready.set()
        if isinstance(event, Delta):
            self.tokens += [time.perf_counter()] * len(event.tokens)
            if event.finish_reason is not None:
                self.ended, self.use, self.failed = time.perf_counter(), event.attention, event.message
                self.ready.set()
                self.done.set()


def start_long(model: str, policy: AttentionPolicy, longest: int, device: str) -> Engine:
    """An engine with room for one sequence of `longest` tokens, and without prefix caching."""
    source = ServerConfig(model=model).model_path
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["max_position_embeddings"] = max(longest, config["max_position_embeddings"])
        file.write_text(json.dumps(config), encoding="utf-8")
        return start(settings(folder, longest, kv_cache_memory=8 * 2**30), policy, device)


def start_shape(shape: str, policy: AttentionPolicy, longest: int, device: str) -> Engine:
    """Random weights; on a GPU with as much room as there is."""
    memory = None if device == "cuda" else 2**30
    with tempfile.TemporaryDirectory() as folder:
        write_dummy_model(Path(folder), shape, longest)
        return start(settings(folder, longest, kv_cache_memory=memory, load_format="dummy"), policy, device)


def settings(model: str, longest: int, **more: Any) -> ServerConfig:
    return ServerConfig(model=model, dtype="bfloat16", enable_prefix_caching=False, max_model_len=longest, **more)


def run(engine: Engine, point: str, prompt: list[int], new: int) -> Run:
    own = Run(time.perf_counter())
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    engine.submit(Request(id=f"{point} {own.began}", prompt=prompt, params=params, point=point), own.publish)
    own.done.wait()
    return own


def measure(engine: Engine, points: list[str], length: int, new: int, rounds: int) -> list[dict[str, Any]]:
    first: dict[str, list[float]] = {point: [] for point in points}
    each: dict[str, list[float]] = {point: [] for point in points}
    uses: dict[str, AttentionUse] = {}
    generator = torch.Generator().manual_seed(length)
    for point in points:
        run(engine, point, torch.randint(300, 4000, (min(4096, length),), generator=generator).tolist(), 4)  # warms up
    for _ in range(rounds):
        prompt = torch.randint(300, 4000, (length,), generator=generator).tolist()
        for point in points:
            own = run(engine, point, prompt, new)
            assert own.use is not None
            first[point].append(own.started - own.began)
            each[point].append((own.ended - own.started) / (new - 1))
            uses[point] = own.use
    results = []
    for point in points:
        use = uses[point]
        results.append(
            {
                "point": point,
                "length": length,
                "ttft_seconds": round(statistics.median(first[point]), 4),
                "ttft_times_faster": round(
                    statistics.median(a / b for a, b in zip(first["dense"], first[point], strict=True)), 3
                ),
                "tpot_seconds": round(statistics.median(each[point]), 6),
                "tpot_times_faster": round(
                    statistics.median(a / b for a, b in zip(each["dense"], each[point], strict=True)), 3
                ),
                "prefill_density": round(use.prefill_read / use.prefill_possible, 4),
                "decode_density": round(use.decode_read / use.decode_possible, 4),
                "kv_bytes": use.kv_bytes,
                "rounds": rounds,
            }
        )
        print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    return results


def together(engine: Engine, point: str, prompts: list[list[int]], new: int) -> float:
    """Seconds per token of the last of some sequences to start, while all of them generate; all are then cancelled."""
    runs = [Run(time.perf_counter()) for _ in prompts]
    params = SamplingParams(max_tokens=new + SPARE, temperature=0.0, ignore_eos=True)
    tickets = [
        engine.submit(Request(id=f"{point} {n} {own.began}", prompt=prompt, params=params, point=point), own.publish)
        for n, (own, prompt) in enumerate(zip(runs, prompts, strict=True))
    ]
    for own in runs:
        own.ready.wait()
    last = max(runs, key=lambda own: own.started)
    while len(last.tokens) <= new and not any(own.done.is_set() for own in runs):
        time.sleep(0.002)
    ended = [own for own in runs if own.done.is_set()]
    for ticket in tickets:
        ticket.cancel()
    while engine.stats().running:
        time.sleep(0.002)
    if len(last.tokens) <= new:
        raise RuntimeError(f"a sequence ended before the measurement did: {ended[0].failed or 'too few spare tokens'}")
    return (last.tokens[new] - last.tokens[0]) / new


def measure_together(
    engine: Engine, points: list[str], length: int, batch: int, new: int, rounds: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(length)
    each: dict[str, list[float]] = {point: [] for point in points}
    for point in points:
        together(engine, point, [torch.randint(300, 4000, (256,), generator=generator).tolist()] * batch, 4)  # warms up
    for _ in range(rounds):
        prompts = [torch.randint(300, 4000, (length,), generator=generator).tolist() for _ in range(batch)]
        for point in points:
            each[point].append(together(engine, point, prompts, new))
    results = []
    for point in points:
        faster = statistics.median(a / b for a, b in zip(each["dense"], each[point], strict=True))
        results.append(
            {
                "point": point,
                "length": length,
                "batch": batch,
                "tpot_seconds": round(statistics.median(each[point]), 6),
                "tpot_times_faster": round(faster, 3),
                "rounds": rounds,
            }
        )
        print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    return results


def length_and_batch(text: str) -> tuple[int, int]:
    length, batch = map(int, text.split("x"))
    return length, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(files("gossamer") / "configs" / "models" / DEMO_MODEL))
    parser.add_argument("--points", nargs="+", default=["dense", "gossamer-demo-mixed"])
    parser.add_argument("--shape", choices=SHAPES, help="instead of --model and --points: random weights")
    parser.add_argument("--share", type=float, default=0.125, help="of the pages, with --shape")
    parser.add_argument("--budget", type=int, default=2048, help="keys that a generated token reads, with --shape")
    parser.add_argument("--decode", type=length_and_batch, nargs="*", default=[], metavar="LENGTHxBATCH")
    parser.add_argument("--lengths", type=int, nargs="*", default=[32768])
    parser.add_argument("--tokens", type=int, default=33, help="to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    longest = max(length for length, _ in [*((length, 1) for length in args.lengths), *args.decode])
    longest += args.tokens + (SPARE if args.decode else 0)
    results: list[dict[str, Any]] = []
    if args.shape:
        policy = shaped_points(SHAPES[args.shape], args.share, args.budget)
        engine = start_shape(args.shape, policy, longest, args.device)
    else:
        policy = chosen_points(list(dict.fromkeys(["dense", *args.points])), DEMO_MODEL)
        engine = start_long(args.model, policy, longest, args.device)
    for length in args.lengths:
        results += measure(engine, list(policy.names), length, args.tokens, args.rounds)
        write_report(args.out, {**provenance(args.device), "shape": args.shape, "results": results})
    for length, batch in args.decode:
        results += measure_together(engine, list(policy.names), length, batch, args.tokens, args.rounds)
        write_report(args.out, {**provenance(args.device), "shape": args.shape, "results": results})
    engine.stop(0.0)


if __name__ == "__main__":
    main()
