"""Whole requests under sparse operating points against dense ones: time to first token, and time per token after it.

    python benchmarks/sparse_serving.py --points dense gossamer-demo-mixed:fast --lengths 32768 \
        --out benchmarks/results/sparse_serving_cpu.json

The demo model through the real engine. In every round each point answers one prompt of random tokens, in turn; ratios
are to dense, round by round, above 1 when faster. Prompts longer than the model's positions are for time alone: the
model is told that it has as many.
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
from sparse_points import chosen_points

from gossamer.attention.policy import AttentionPolicy
from gossamer.server.bench.provenance import provenance, write_report
from gossamer.server.config import DEMO_MODEL, ServerConfig
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.request import AttentionUse, Delta, Event, Request, SamplingParams, Started


@dataclass
class Run:
    """One request: when it began, when its prompt was done, when it ended."""

    began: float
    started: float = 0.0
    ended: float = 0.0
    use: AttentionUse | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def publish(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started = time.perf_counter()
        if isinstance(event, Delta) and event.finish_reason is not None:
            self.ended, self.use = time.perf_counter(), event.attention
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
        settings = ServerConfig(
            model=folder,
            dtype="bfloat16",
            kv_cache_memory=8 * 2**30,
            enable_prefix_caching=False,
            max_model_len=longest,
        )
        return start(settings, policy, device)


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
        run(engine, point, torch.randint(300, 4000, (4096,), generator=generator).tolist(), 4)  # warms up
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(files("gossamer") / "configs" / "models" / DEMO_MODEL))
    parser.add_argument("--points", nargs="+", default=["dense", "gossamer-demo-mixed"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--tokens", type=int, default=33, help="to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    policy = chosen_points(list(dict.fromkeys(["dense", *args.points])), DEMO_MODEL)
    engine = start_long(args.model, policy, max(args.lengths) + args.tokens, args.device)
    results: list[dict[str, Any]] = []
    for length in args.lengths:
        results += measure(engine, list(policy.names), length, args.tokens, args.rounds)
        write_report(args.out, {**provenance(), "results": results})
    engine.stop(0.0)


if __name__ == "__main__":
    main()
