"""Time and memory of profiling a model of some shape with random weights, and what attention costs on this device.

    python benchmarks/profile_shape.py --shape 8b --lengths 8192 32768 --out benchmarks/results/gpu_profile.json

Bounds are so wide that the cheapest plan holds: random weights have no answers to lose. `device` in the result is a
device profile (gossamer profile --device-profile) for models of this shape.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from dummy_model import SHAPES, write_dummy_model

from gossamer.attention.profiling.profile import Bound, Settings
from gossamer.server.bench.provenance import provenance, write_report
from gossamer.server.config import ServerConfig
from gossamer.server.profile.run import Job, profile


class Printed:
    """Says each stage in a line."""

    def begin(self, stage: str, total: int) -> None:
        print(f"{stage}: {total}", flush=True)

    def tick(self) -> None: ...

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        write_dummy_model(model, args.shape, 2 * max(args.lengths))
        settings = Settings(
            lengths=tuple(sorted(args.lengths)),
            documents=1,
            questions=args.questions,
            seed=0,
            goal="latency",
            memory=None,
            bounds=(Bound("any", 100.0, 99.0),),
            compare=False,
            train_gates=False,
            train_heads=False,
        )
        config = ServerConfig(model=str(model), load_format="dummy", device=args.device)
        found = profile(Job(config, settings, Path(folder) / "policy.yaml", None, None), Printed())
    heads = found.shape.layers * found.shape.kv_heads
    stages = [
        {
            "stage": each.stage,
            "seconds": round(each.seconds, 2),
            "seconds_per_head_and_1000_tokens": round(1000 * each.seconds / heads / sum(settings.lengths), 5),
            "most_memory_bytes": each.memory,
        }
        for each in found.spent
    ]
    for each in stages:
        print(f"{each['stage']:40} {each['seconds']:9} s")
    about: dict[str, Any] = {"shape": args.shape, "lengths": args.lengths, "questions": args.questions}
    about["candidates"] = {phase: len(own) for phase, own in found.candidates.items()}
    device = found.device.model_dump(mode="json")
    write_report(
        args.out, {**provenance(found.shape.device.type), **about, "results": stages, "device_profile": device}
    )


if __name__ == "__main__":
    main()
