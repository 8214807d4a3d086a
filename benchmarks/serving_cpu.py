"""Dense serving on a CPU against transformers' own `generate`: prompts, decoding, and what the engine adds to a step.

    python benchmarks/serving_cpu.py --out benchmarks/results/serving_cpu.json

Both sides run in this process, on the same threads and in the same dtype, in turn: every ratio is the median over
rounds of engine against transformers in that round, so that a machine whose speed drifts does not decide it. Ratios
above 1 mean that the engine is faster.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gossamer.server.bench.provenance import provenance, write_report
from gossamer.server.config import DEMO_MODEL, ServerConfig
from gossamer.server.engine.build import build_engine
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.records import FirstToken, RequestRecord, StepRecord
from gossamer.server.engine.request import Delta, Event, Request, SamplingParams, Started

DECODE_PROMPT = 1024
DECODE_TOKENS = 65


@dataclass
class Steps:
    """The engine's observer: keeps the steps."""

    steps: list[StepRecord] = field(default_factory=list)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def first_token(self, record: FirstToken) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def finished(self, record: RequestRecord) -> None: ...
    def checked(self, checked: object) -> None: ...


def engine_seconds(engine: Engine, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """(until the last first token, until the end) of all prompts at once, greedy, `new` tokens each."""
    done = threading.Semaphore(0)
    started: list[float] = []

    def publish(event: Event) -> None:
        if isinstance(event, Started):
            started.append(time.perf_counter())
        if isinstance(event, Delta) and event.finish_reason is not None:
            assert event.finish_reason == "length", event
            done.release()

    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.submit(Request(id=f"{began}-{i}", prompt=prompt, params=params), publish)
    for _ in prompts:
        done.acquire()
    return max(started) - began, time.perf_counter() - began


def generate_seconds(model: Any, prompts: list[list[int]], new: int) -> float:
    """One call of `generate` for all prompts, which have the same length."""
    ids = torch.tensor(prompts)
    began = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    assert out.shape[1] == ids.shape[1] + new
    return time.perf_counter() - began


class Runs:
    """Both sides, and prompts that nothing has seen before."""

    def __init__(self, path: str, dtype: str, rounds: int) -> None:
        self.rounds = rounds
        self.steps = Steps()
        config = ServerConfig(model=path, dtype=dtype, enable_prefix_caching=False, kv_cache_memory=4 * 2**30)  # type: ignore[arg-type]
        self.engine = build_engine(config, self.steps, print)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.random = torch.Generator().manual_seed(0)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        low, high = 300, self.engine.model.vocab_size
        return torch.randint(low, high, (count, length), generator=self.random).tolist()

    def paired(self, ours: Callable[[], float], theirs: Callable[[], float]) -> dict[str, Any]:
        """Medians and the ratio theirs / ours, round by round."""
        pairs = [(ours(), theirs()) for _ in range(self.rounds + 1)][1:]  # the first round warms up
        ratios = [b / a for a, b in pairs]
        return {
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(r, 3) for r in ratios],
            "engine_seconds": round(statistics.median(a for a, _ in pairs), 4),
            "transformers_seconds": round(statistics.median(b for _, b in pairs), 4),
        }

    def prefill(self, length: int) -> dict[str, Any]:
        """Time to the first token of one prompt."""

        def ours() -> float:
            return engine_seconds(self.engine, self.prompts(1, length), 1)[0]

        def theirs() -> float:
            return generate_seconds(self.model, self.prompts(1, length), 1)

        return self.paired(ours, theirs)

    def decode(self, count: int, batched: bool) -> dict[str, Any]:
        """Decoding `count` requests; transformers takes them one after the other, or as one batch of equal lengths."""

        def ours() -> float:
            first, total = engine_seconds(self.engine, self.prompts(count, DECODE_PROMPT), DECODE_TOKENS)
            return total - first

        def theirs() -> float:
            groups = [self.prompts(count, DECODE_PROMPT)] if batched else [self.prompts(1, DECODE_PROMPT)] * count
            whole = sum(generate_seconds(self.model, group, DECODE_TOKENS) for group in groups)
            return whole - sum(generate_seconds(self.model, group, 1) for group in groups)

        return self.paired(ours, theirs)

    def total(self, count: int) -> dict[str, Any]:
        """Prompts and answers of `count` requests together, against `generate` one after the other."""

        def ours() -> float:
            return engine_seconds(self.engine, self.prompts(count, DECODE_PROMPT), DECODE_TOKENS)[1]

        def theirs() -> float:
            return sum(
                generate_seconds(self.model, self.prompts(1, DECODE_PROMPT), DECODE_TOKENS) for _ in range(count)
            )

        return self.paired(ours, theirs)

    def overhead(self, count: int) -> dict[str, Any]:
        """Share of a decode step that is not the model's forward pass."""
        self.steps.steps.clear()
        engine_seconds(self.engine, self.prompts(count, DECODE_PROMPT), DECODE_TOKENS)
        decode = [s for s in self.steps.steps if s.prompt_tokens == 0 and s.sequences == count]
        shares = [(s.seconds - s.model_seconds) / s.seconds for s in decode]
        return {
            "share_outside_forward": round(statistics.median(shares), 4),
            "step_milliseconds": round(1000 * statistics.median(s.seconds for s in decode), 3),
            "steps": len(decode),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(files("gossamer") / "configs" / "models" / DEMO_MODEL))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = Runs(options.model, options.dtype, options.rounds)
    runs.engine.start()
    result: dict[str, Any] = {"provenance": provenance(), "dtype": options.dtype, "decode": {}}
    for count in (1, 4, 16):
        result["decode"][str(count)] = show(f"decode, {count} requests, generate one by one", runs.decode(count, False))
    result["decode_batched"] = {
        str(count): show(f"decode, {count} requests, generate in one batch", runs.decode(count, True))
        for count in (4, 16)
    }
    result["total_16"] = show("prompts and answers of 16 requests, generate one by one", runs.total(16))
    result["overhead_16"] = show("decode step of 16 sequences", runs.overhead(16))
    result["prefill"] = {str(n): show(f"prompt of {n}", runs.prefill(n)) for n in options.lengths}
    runs.engine.stop(0.0)
    write_report(options.out, result)


def show(name: str, result: dict[str, Any]) -> dict[str, Any]:
    print(f"{name}: {result}", flush=True)
    return result


if __name__ == "__main__":
    main()
