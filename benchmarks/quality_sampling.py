"""What it costs to look twice at live traffic, and how near the sampled numbers come to those of looking at everything.

    python benchmarks/quality_sampling.py --out benchmarks/results/quality_sampling_cpu.json

The demo model under each operating point, through the real engine. Cost: prompts with checks at the default rate and
without any, in turn (the median of the ratios of rounds); within each answer every other token with and without (the
ratio of means); and the share of the time that the checks took (on a GPU, of the host's time), which noise does not
reach. Estimates: the same documents once more, at the rate given by --sampled, against checks of every head, tile and
token.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_engine import Silent, start
from demo_model.example_document import DEMO, example
from sparse_points import chosen_points
from sparse_serving import run, settings

from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.quality import QualitySampler
from gossamer.attention.second_look import Watch
from gossamer.attention.step import Step
from gossamer.server.bench.provenance import provenance, write_report
from gossamer.server.config import ServerConfig
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.executor import Executor
from gossamer.server.engine.quality import Checked
from gossamer.server.engine.tokenizer import Tokenizer


class Kept(Silent):
    """An observer that keeps the checks."""

    def __init__(self) -> None:
        self.checks: list[Checked] = []

    def checked(self, checked: object) -> None:
        assert isinstance(checked, Checked)
        self.checks.append(checked)


@dataclass
class Alternating(Silent):
    """Lets every other token of an answer be looked at, and keeps how long each took."""

    executor: Executor
    sampler: QualitySampler
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def inter_token(self, seconds: float) -> None:
        looked = self.executor.quality is not None
        self.seconds[looked].append(seconds)
        self.executor.quality = None if looked else self.sampler


class Everything(QualitySampler):
    """Looks at every head that may leave keys out, in every tile and for every token."""

    def _chosen(self, heads: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        return heads


class Timed(QualitySampler):
    """Adds up the seconds that choosing and looking take; on a GPU, until the device was told to."""

    seconds = 0.0

    def choose(self, step: Step, tables: Any, generated: bool) -> Watch | None:
        began = time.perf_counter()
        watch = super().choose(step, tables, generated)
        self.seconds += time.perf_counter() - began
        if watch is None:
            return None
        return TimedWatch(watch, self)


class TimedWatch(Watch):
    """The same, timed."""

    __slots__ = ("_sampler",)

    def __init__(self, watch: Watch, sampler: Timed) -> None:
        super().__init__(watch._left, watch.blind)
        self._sampler = sampler

    def look(self, *args: Any, **options: Any) -> None:
        began = time.perf_counter()
        super().look(*args, **options)
        self._sampler.seconds += time.perf_counter() - began


def cost(
    engine: Engine, point: str, prompts: list[list[int]], new: int, rounds: int, rate: float, windows: Any
) -> dict[str, Any]:
    loop, first = engine._loop, dict[bool, list[float]]({True: [], False: []})
    executor, timed, observer = loop.executor, Timed(rate, windows), loop.observer
    executor.quality = None
    run(engine, point, prompts[0][:4096], 4)  # warms up
    loop.observer = answers = Alternating(executor, timed)
    for number in range(rounds):
        for looks in (True, False) if number % 2 else (False, True):
            executor.quality = timed if looks else None
            own = run(engine, point, prompts[number % len(prompts)], new)
            first[looks].append(own.started - own.began)
    loop.observer = observer
    busy = sum(first[True]) + sum(answers.seconds[True])
    return {
        "rate": rate,
        "rounds": rounds,
        "tokens": sum(map(len, answers.seconds.values())),
        "ttft_ratio": round(statistics.median(a / b for a, b in zip(first[True], first[False], strict=True)), 4),
        "tpot_ratio": round(statistics.fmean(answers.seconds[True]) / statistics.fmean(answers.seconds[False]), 4),
        "share_of_time": round(timed.seconds / busy, 5),
    }


def means(checks: list[Checked]) -> dict[str, dict[str, float]]:
    """By phase: means over the groups of layers, each the mean of its checks, as a dashboard would show them."""
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for checked in checks:
        if checked.quality is not None:
            found[checked.phase][checked.check.layers].append(checked.quality)
    answer = {}
    for phase, groups in found.items():
        count = sum(map(len, groups.values()))
        answer[phase] = {"checks": float(count)} | {
            name: round(statistics.fmean(statistics.fmean(getattr(q, name) for q in own) for own in groups.values()), 4)
            for name in ("recall", "error", "top1")
        }
    return answer


def estimates(
    engine: Engine, observer: Kept, point: str, prompts: list[list[int]], new: int, rate: float, windows: Any
) -> dict[str, Any]:
    executor = engine._loop.executor
    found = {}
    for name, sampler in (("sampled", QualitySampler(rate, windows)), ("everything", Everything(1.0, windows))):
        executor.quality = sampler
        observer.checks.clear()
        for each in prompts:
            run(engine, point, each, new)
        found[name] = means(observer.checks)
        found[f"{name}_unchecked"] = len([c for c in observer.checks if c.quality is None])
    return {"rate": rate, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", default=["gossamer-demo:fast", "gossamer-demo-mixed:fast"])
    parser.add_argument("--length", type=int, default=32768, help="of the prompts that are timed")
    parser.add_argument("--estimated", type=int, default=12288, help="length of those that are looked at whole")
    parser.add_argument("--sampled", type=float, default=0.1)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ServerConfig(model="gossamer-demo")
    tokenizer = Tokenizer.load(config.model_path, revision=None, chat_template=None)
    points = [point for point in chosen_points(args.points, "").points if point.name != "dense"]
    long, short = (
        [asked(tokenizer, length, seed) for seed in range(20, 20 + args.documents)]
        for length in (args.length, args.estimated)
    )
    results = []
    for each in points:
        observer = Kept()
        own_settings = settings("gossamer-demo", args.length + args.new + 64, kv_cache_memory=2 * 2**30)
        engine = start(own_settings, AttentionPolicy("quality", (each,)), args.device, observer)
        windows = engine._loop.executor.model.shape.windows
        own = {
            "point": each.name,
            "length": args.length,
            "cost": cost(engine, each.name, long, args.new, args.rounds, config.quality_sample_rate, windows),
            "estimated_length": args.estimated,
            "estimates": estimates(engine, observer, each.name, short, 64, args.sampled, windows),
        }
        engine.stop(0.0)
        print(json.dumps(own, indent=1), flush=True)
        results.append(own)
    write_report(args.out, {**provenance(args.device), "results": results})


def asked(tokenizer: Tokenizer, tokens: int, seed: int) -> list[int]:
    """The tokens of a document with facts in it, and a question."""
    return tokenizer.encode_chat(example(tokens - 200, 6, seed, DEMO).messages(0))


if __name__ == "__main__":
    main()
