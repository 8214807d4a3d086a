"""What sparse attention costs in answers: the demo model's tasks through the real engine, at several operating points.

    python benchmarks/sparse_accuracy.py --text demo/corpus/eval.txt --lengths 16384 --points dense sweep --out a.json
    python benchmarks/sparse_accuracy.py --text demo/corpus/eval.txt --lengths 16384 --points dense sweep --first 4 ...
    python benchmarks/sparse_accuracy.py --merge a.json b.json --out benchmarks/results/sparse_accuracy_cpu.json

Points are operating points of policy files (`gossamer-demo-mixed:fast`, or a file's name alone for all of them),
`dense`, and `sweep`: each backend alone, with budgets from generous to small. All points answer the same questions on
the same documents, which training never saw, so that differences are paired. A document of real text holds 16 single
facts, four keys of several values and four chains; a second one is asked for four keys at a time; a third is all facts.
With `--kv-cache-dtype auto fp8` each point is asked again with keys and values in FP8, under the name `dense, fp8`.
"""

import argparse
import json
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from demo_engine import start
from demo_model.evaluate import weights_digest, wilson
from sparse_points import chosen_points

from gossamer.attention.profiling.tasks import CHAIN, TASKS, Filler, Prompt, Question, Task, make_prompt, score
from gossamer.server.bench.provenance import provenance, write_report
from gossamer.server.config import DEMO_MODEL, ServerConfig
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.request import AttentionUse, Delta, Event, Request, SamplingParams

KINDS = (
    Task("facts", keys=16, repeated=4, chains=4),
    Task("several", keys=16, together=4),
    TASKS["pairs"],
)
MOST_TOKENS = 96  # of a reply


@dataclass
class Score:
    """One task at one length under one point."""

    point: str
    task: str
    length: int
    questions: int = 0
    references: int = 0
    found: float = 0.0
    reads: list[float] = field(default_factory=lambda: [0.0] * 4)  # as AttentionUse: prompt's, then decode's

    def add(self, other: Mapping[str, Any]) -> None:
        self.questions += other["questions"]
        self.references += other["references"]
        self.found += other["found"]
        self.reads = [mine + more for mine, more in zip(self.reads, other["reads"], strict=True)]

    def shown(self) -> dict[str, Any]:
        """For the JSON file."""
        densities = [part / whole if whole else None for part, whole in (self.reads[:2], self.reads[2:])]
        names = ("prefill_density", "decode_density")
        return {
            "point": self.point,
            "task": self.task,
            "length": self.length,
            "questions": self.questions,
            "references": self.references,
            "found": round(self.found, 3),
            "accuracy": round(self.found / max(1, self.references), 4),
            "wilson_95": [round(bound, 4) for bound in wilson(self.found, self.references)],
            **{name: None if d is None else round(d, 4) for name, d in zip(names, densities, strict=True)},
            "reads": self.reads,
        }


@dataclass
class Reply:
    """The events of one request."""

    text: str = ""
    use: AttentionUse | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def publish(self, event: Event) -> None:
        if isinstance(event, Delta):
            self.text += event.text
            if event.finish_reason is not None:
                self.use = event.attention
                self.done.set()


def kind_of(task: Task, question: Question) -> str:
    """The RULER task that a question belongs to."""
    if question.text.startswith(CHAIN.split("{")[0]):
        return "variables"
    return {"pairs": "pairs", "several": "multiquery"}.get(
        task.name, "multikey" if len(question.references) == 1 else "multivalue"
    )


def ask(engine: Engine, point: str, prompt: Prompt) -> list[tuple[Question, Reply]]:
    """Every question alone behind the document; the first computes the document for the others."""
    replies: list[tuple[Question, Reply]] = []
    for number, question in enumerate(prompt.questions):
        ids = engine.tokenizer.encode_chat(prompt.messages(number), add_generation_prompt=True)
        reply, params = Reply(), SamplingParams(max_tokens=MOST_TOKENS, temperature=0.0)
        name = f"{point} {prompt.task} {prompt.seed} {number}"
        engine.submit(Request(id=name, prompt=ids, params=params, point=point), reply.publish)
        if number == 0:
            reply.done.wait()
        replies.append((question, reply))
    for _, reply in replies:
        reply.done.wait()
    return replies


def measure(
    engine: Engine,
    points: Iterable[str],
    scores: dict[tuple[str, str, int], Score],
    prompt: Prompt,
    task: Task,
    note: str,
) -> None:
    """One document at every point; their names get the note."""
    for point in points:
        for question, reply in ask(engine, point, prompt):
            kind = kind_of(task, question)
            key = (point + note, kind, prompt.length)
            own = scores.setdefault(key, Score(*key))
            assert reply.use is not None
            use = reply.use
            reads = [use.prefill_read, use.prefill_possible, use.decode_read, use.decode_possible]
            count = len(question.references)
            found = score(reply.text, question.references) * count
            own.add({"questions": 1, "references": count, "found": found, "reads": reads})


def merged(reports: Iterable[Mapping[str, Any]]) -> list[Score]:
    """The cells of several runs, added up."""
    scores: dict[tuple[str, str, int], Score] = {}
    for report in reports:
        for cell in report["cells"]:
            key = (cell["point"], cell["task"], cell["length"])
            scores.setdefault(key, Score(*key)).add(cell)
    return list(scores.values())


def table(scores: Iterable[Score], length: int) -> str:
    """Markdown: a row per point with its densities, the accuracy per task, the worst loss against dense."""
    cells = {(score.point, score.task): score.shown() for score in scores if score.length == length}
    tasks = list(dict.fromkeys(task for _, task in cells))
    lines = ["| point | prefill | decode | " + " | ".join(tasks) + " | worst loss |", "|---" * (len(tasks) + 4) + "|"]
    for point in dict.fromkeys(point for point, _ in cells):
        own = {task: cells[point, task] for task in tasks if (point, task) in cells}
        reads = [sum(cell["reads"][i] for cell in own.values()) for i in range(4)]
        densities = [f"{part / whole:.3f}" if whole else "" for part, whole in (reads[:2], reads[2:])]
        shown = [f"{100 * own[task]['accuracy']:.1f}" if task in own else "" for task in tasks]
        worst = max(
            (
                (cells["dense", task]["accuracy"] - cell["accuracy"], task)
                for task, cell in own.items()
                if ("dense", task) in cells
            ),
            default=(math.nan, "dense was not asked"),
        )
        lines.append(f"| {point} | {' | '.join(densities + shown)} | {100 * worst[0]:.1f} ({worst[1]}) |")
    return "\n".join(lines)


def pooled(scores: Iterable[Score]) -> dict[str, Score]:
    """Per point, all tasks together."""
    whole: dict[str, Score] = {}
    for each in scores:
        whole.setdefault(each.point, Score(each.point, "all", each.length)).add(vars(each))
    return whole


def enough(scores: Iterable[Score], length: int) -> list[dict[str, Any]]:
    """For each backend of the sweep, the lowest densities down to which all tasks together lose at most 2 points, which
    is about nothing to so many answers, and at most 5."""
    whole = pooled(each for each in scores if each.length == length)
    dense = whole["dense"].shown()["accuracy"]
    families: dict[str, list[dict[str, Any]]] = {}
    for point, each in whole.items():
        backend, _, budget = point.partition(":")
        if budget[:1].isdigit():
            families.setdefault(backend, []).append(each.shown())
    found = []
    for backend, cells in families.items():
        cells.sort(key=lambda cell: sum(cell["reads"][::2]) / sum(cell["reads"][1::2]), reverse=True)
        for most in (0.02, 0.05):
            lowest = None
            for cell in cells:
                if dense - cell["accuracy"] > most:
                    break
                lowest = {key: cell[key] for key in ("point", "prefill_density", "decode_density", "accuracy")}
            found.append({"backend": backend, "length": length, "loses_at_most": most, "lowest": lowest})
    return found


def write(path: Path | None, scores: Iterable[Score], about: Mapping[str, Any]) -> None:
    write_report(path, {**about, "cells": [score.shown() for score in scores]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(files("gossamer") / "configs" / "models" / DEMO_MODEL))
    parser.add_argument("--artefacts", default=DEMO_MODEL, help="what the sweep's label and gate files begin with")
    parser.add_argument("--text", type=Path, help="held-out filler: eval.txt of demo_model/corpus.py")
    parser.add_argument("--points", nargs="+", default=["dense", "sweep"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384])
    parser.add_argument("--documents", type=int, default=4, help="of each of the three kinds")
    parser.add_argument("--questions", type=int, default=24, help="about a document, at most")
    parser.add_argument("--first", type=int, default=0, help="seed of the first document")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto"], choices=["auto", "fp8"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--merge", type=Path, nargs="+", help="add up these results instead of measuring")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.merge:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in args.merge]
        scores = merged(reports)
        lengths = sorted({each.length for each in scores})
        about: dict[str, Any] = {
            "runs": [{key: value for key, value in report.items() if key != "cells"} for report in reports],
            "enough": [line for length in lengths for line in enough(scores, length)],
        }
        write(args.out, scores, about)
        for length in lengths:
            print(f"\n{length} tokens\n\n{table(scores, length)}")
        for line in about["enough"]:
            print(line)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    policy = chosen_points(args.points, args.artefacts)
    found: dict[tuple[str, str, int], Score] = {}
    about = {**provenance(), "weights": weights_digest(args.model), "seeds": [args.first, args.first + args.documents]}
    common = ServerConfig(model=args.model, dtype="bfloat16", kv_cache_memory=6 * 2**30, max_num_seqs=32)
    for kept in args.kv_cache_dtype:
        engine = start(replace(common, kv_cache_dtype=kept), policy)
        filler = Filler(
            args.text.read_text(encoding="utf-8").replace("\0", "\n").split("\n"),
            partial(engine.tokenizer.encode, add_special_tokens=False),
        )
        for length in args.lengths:
            for seed in range(args.first, args.first + args.documents):
                for task in KINDS:
                    prompt = make_prompt(task, length, seed, filler, questions=args.questions, reserve=MOST_TOKENS + 64)
                    measure(engine, policy.names, found, prompt, task, "" if kept == "auto" else f", {kept}")
                    write(args.out, found.values(), about)
        engine.stop(0.0)
    for length in args.lengths:
        print(f"\n{length} tokens\n\n{table(found.values(), length)}", flush=True)


if __name__ == "__main__":
    main()
