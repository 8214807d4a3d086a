"""Accuracy of a checkpoint on the synthetic tasks, with plain full attention and greedy decoding.

    python benchmarks/demo_model/evaluate.py --model configs/models/gossamer-demo --text demo/corpus/eval.txt \
        --lengths 1024 4096 --documents 8 --questions 8 --out benchmarks/results/demo_model_accuracy.json

Each prompt is a chat of one user turn (document, question). Several questions about a document share its keys and
values, which changes nothing in the answers: each question is asked alone behind the document. A reply is scored by the
share of reference strings found in it. Intervals are Wilson's at 95 %, over reference strings.
"""

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.attention.profiling.tasks import TASKS, Filler, Prompt, make_prompt, score

MARK = "\u0000"


@dataclass
class Cell:
    """Counts of one task at one length."""

    task: str
    length: int
    documents: int = 0
    questions: int = 0
    references: int = 0
    found: float = 0.0
    whole: int = 0  # replies that hold every reference
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of references found, over all questions."""
        return self.found / max(1, self.references)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `accuracy`."""
        return wilson(self.found, self.references)


def wilson(found: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, `found` of `count`."""
    n, z = max(1, count), 1.96
    p = found / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


class Reader:
    """A checkpoint that reads a document once and answers questions about it."""

    def __init__(self, path: str, device: str, dtype: torch.dtype) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self.model: Any = model.to(device).eval()
        self.device = device
        eos = self.model.generation_config.eos_token_id
        self.stops = set(eos if isinstance(eos, list) else [eos])

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def prompt_ids(self, prompt: Prompt, index: int) -> list[int]:
        """The chat of question `index` as tokens, ready for the reply."""
        text = self.tokenizer.apply_chat_template(prompt.messages(index), tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    @torch.inference_mode()
    def replies(self, prompt: Prompt, most: int = 128) -> list[str]:
        """One greedy reply per question, each asked alone."""
        prompts = [self.prompt_ids(prompt, index) for index in range(len(prompt.questions))]
        shared = min(_common_prefix(prompts[0], other) for other in prompts)
        shared = min(shared, len(prompts[0]) - 1)
        document = torch.tensor([prompts[0][:shared]], device=self.device)
        cache = self.model.model(document, use_cache=True).past_key_values
        replies = []
        for ids, question in zip(prompts, prompt.questions, strict=True):
            replies.append(self._reply(ids[shared:], question.answer, cache, shared, most))
        return replies

    def _reply(self, rest: list[int], expected: str, cache: Any, shared: int, most: int) -> str:
        """Greedy reply behind `shared` cached tokens and `rest`. The expected reply is tried first, in one pass: where
        each of its tokens is the likeliest, decoding token by token would have given the same."""
        hoped = self.encode(expected)
        logits = self._logits(rest + hoped, cache, shared)[len(rest) - 1 :]
        best = logits.argmax(-1).tolist()
        agreed = next((place for place, token in enumerate(hoped) if best[place] != token), len(hoped))
        reply, token = hoped[:agreed], best[agreed]
        self._crop(cache, shared + len(rest) + agreed)
        while token not in self.stops and len(reply) < most:
            reply.append(token)
            token = int(self._logits([token], cache, cache.get_seq_length())[-1].argmax())
        self._crop(cache, shared)
        return str(self.tokenizer.decode(reply, skip_special_tokens=True))

    def _logits(self, ids: list[int], cache: Any, start: int) -> torch.Tensor:
        """[len(ids), vocabulary] of tokens that follow `start` cached ones."""
        tokens = torch.tensor([ids], device=self.device)
        places = torch.arange(start, start + len(ids), device=self.device)[None]
        out: torch.Tensor = self.model(tokens, position_ids=places, past_key_values=cache, use_cache=True).logits[0]
        return out

    @staticmethod
    def _crop(cache: Any, length: int) -> None:
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())  # as a number of tokens to take away, below zero


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def measure(
    reader: Reader, task: str, length: int, documents: int, questions: int, filler: Filler, seed: int, misses: list[Any]
) -> Cell:
    """Ask about `documents` documents; single-question tasks get more documents in place of more questions."""
    cell = Cell(task, length)
    start = time.time()
    while cell.questions < documents * questions and cell.documents < documents * (3 if questions > 2 else 1):
        prompt = make_prompt(TASKS[task], length, seed + cell.documents, filler, questions=questions, reserve=160)
        for question, reply in zip(prompt.questions, reader.replies(prompt), strict=True):
            share = score(reply, question.references)
            cell.questions += 1
            cell.references += len(question.references)
            cell.found += share * len(question.references)
            cell.whole += share == 1.0
            if share < 1.0 and len(misses) < 400:
                misses.append({"task": task, "length": length, "expected": question.answer, "reply": reply})
        cell.documents += 1
    cell.seconds = round(time.time() - start, 1)
    return cell


def table(cells: list[Cell]) -> str:
    """Markdown: a row per task, a column per length; share of references found, interval, count."""
    lengths = sorted({cell.length for cell in cells})
    lines = ["| task | " + " | ".join(f"{length // 1024}K" for length in lengths) + " |"]
    lines.append("|---|" + "---|" * len(lengths))
    for task in dict.fromkeys(cell.task for cell in cells):
        row = {cell.length: cell for cell in cells if cell.task == task}
        shown = []
        for length in lengths:
            cell = row.get(length)
            if cell is None:
                shown.append("")
                continue
            low, high = cell.interval
            shown.append(f"{100 * cell.accuracy:.1f} % [{100 * low:.0f}, {100 * high:.0f}] of {cell.references}")
        lines.append(f"| {task} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="held-out filler: eval.txt of corpus.py")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=8, help="about one document, where the task has as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--misses", type=Path, help="wrong replies, for reading")
    args = parser.parse_args()
    reader = Reader(args.model, args.device, getattr(torch, args.dtype))
    filler = Filler(args.text.read_text(encoding="utf-8").replace(MARK, "\n").split("\n"), reader.encode)
    cells: list[Cell] = []
    misses: list[Any] = []
    for length in args.lengths:
        for task in args.tasks:
            cell = measure(reader, task, length, args.documents, args.questions, filler, args.seed, misses)
            cells.append(cell)
            print(f"{length} {task}: {cell.accuracy:.3f} of {cell.references}, {cell.seconds} s", flush=True)
    print("\n" + table(cells))
    if args.misses:
        args.misses.write_text(json.dumps(misses, indent=1))
    if args.out:
        report = {
            "command": "python benchmarks/demo_model/evaluate.py " + " ".join(_plain(arg) for arg in sys.argv[1:]),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "weights": weights_digest(args.model),
            "device": args.device,
            "dtype": args.dtype,
            "attention": "full (sdpa)",
            "seed": args.seed,
            "cells": [asdict(cell) | {"accuracy": cell.accuracy, "wilson_95": cell.interval} for cell in cells],
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def weights_digest(model: str) -> str | None:
    """SHA-256 of the weights' file, where the model is a folder with one."""
    file = Path(model) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _plain(argument: str) -> str:
    """An argument without the folders of the machine it was run on."""
    return "/".join(Path(argument).parts[-3:]) if argument.startswith("/") else argument


if __name__ == "__main__":
    main()
