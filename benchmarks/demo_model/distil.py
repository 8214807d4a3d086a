"""Make what the packaged policies of the demo model read beside themselves: label channels and learned gates.

    python benchmarks/demo_model/corpus.py --out demo/corpus
    python benchmarks/demo_model/distil.py --model configs/models/gossamer-demo --corpus demo/corpus \
        --out configs/policies

The model reads training documents with a question and its answer; `gossamer.attention.profiling` does the rest. Every
fifth document is kept back, to say how far the gates' weights are from dense attention where they have not been taught.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.attention.policy import dense_policy
from gossamer.attention.profiling.capture import Captured, capture
from gossamer.attention.profiling.gate_training import BLOCKS, HELD_OUT, QUERIES, places
from gossamer.attention.profiling.gates import Lesson, Phase, distil, divergence, lesson, write_gates
from gossamer.attention.profiling.labels import rank_channels, write_labels
from gossamer.attention.profiling.tasks import TASKS, Filler, make_prompt
from gossamer.attention.step import TILE_ROWS
from gossamer.kernels.rotary import Rotary

ASKED = ("multikey", "pairs", "multiquery", "variables", "multivalue", "single", "variables_letters")


class Model:
    """The demo model, the documents it reads, and what its layers do with them."""

    def __init__(self, path: str, corpus: Path, device: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device).eval()
        text = (corpus / "train.txt").read_text(encoding="utf-8")[:4_000_000].replace("\0", "\n")
        self.filler = Filler(text.split("\n"), self.encode)
        config, embedding = self.module.config, self.module.model.rotary_emb
        self.policy = dense_policy(config.num_hidden_layers, config.num_key_value_heads)
        self.rotary = Rotary(embedding.inv_freq.float(), float(embedding.attention_scaling))
        self.block = TILE_ROWS * config.num_key_value_heads // config.num_attention_heads
        self.device = device

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def read(self, number: int, length: int) -> tuple[list[Captured], int]:
        """The layers' queries and keys on a document with its answer, and where the reply begins."""
        prompt = make_prompt(TASKS[ASKED[number % len(ASKED)]], length, number, self.filler, split="train", reserve=160)
        chat = [*prompt.messages(0), {"role": "assistant", "content": prompt.questions[0].answer}]
        ids = self.encode(self.tokenizer.apply_chat_template(chat, tokenize=False))
        reply = len(ids) - len(self.encode(prompt.questions[0].answer)) - 1
        return capture(self.module, torch.tensor(ids, device=self.device), self.policy), reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--name", default="gossamer-demo", help="what their names begin with")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 4096, 8192], help="taken in turn")
    parser.add_argument("--steps", type=int, default=1000, help="of training, for each gate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, began = Model(args.model, args.corpus, args.device), time.time()
    sizes: dict[Phase, int] = {"prefill": model.block, "decode": 1}
    lessons: dict[Phase, list[list[Lesson]]] = {phase: [] for phase in sizes}  # [document][layer]
    texts: list[list[Captured]] = []
    for number in range(args.documents):
        layers, reply = model.read(number, args.lengths[number % len(args.lengths)])
        length, rng = len(layers[0].q), random.Random(number)
        for (phase, size), count in zip(sizes.items(), (BLOCKS, QUERIES), strict=True):
            first = places(rng, count, length, reply, size)
            lessons[phase].append([lesson(layer, model.rotary, first, size) for layer in layers])
        if len(texts) < len(ASKED):
            texts.append(layers)
        print(f"document {number + 1}, {length} tokens, {time.time() - began:.0f} s", flush=True)
    write_labels(args.out / f"{args.name}-labels.safetensors", rank_channels(texts))
    gates = []
    for layer in range(len(texts[0])):
        gates.append({})
        for phase, documents in lessons.items():
            taught = [each[layer] for number, each in enumerate(documents) if number % HELD_OUT]
            kept = [each[layer] for number, each in enumerate(documents) if number % HELD_OUT == 0]
            gates[-1][phase] = distil(taught, model.rotary, args.steps)
            far = [
                sum(float(divergence(weights, model.rotary, each)) for each in kept) / len(kept)
                for weights in (distil(taught, model.rotary, 0), gates[-1][phase])
            ]
            print(f"layer {layer}, {phase}: {far[0]:.3f} nats from dense before, {far[1]:.3f} after", flush=True)
    write_gates(args.out / f"{args.name}-gates.safetensors", gates, model.rotary, model.rotary)
    print(f"{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
