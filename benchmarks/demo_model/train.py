"""Train gossamer-demo: a small Llama that finds facts in long text.

    python benchmarks/demo_model/corpus.py --out demo/corpus
    python benchmarks/demo_model/train.py --corpus demo/corpus --work demo/run        # again to go on after a stop
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/demo_model/train.py ...         # a process per core

Every step mixes short rows, trained whole, with one long document. Of a long document only the questions and answers
are trained: the document runs without gradients, its keys and values are kept, and the turns attend to all of them. On
a CPU its rows look nearby only (`context_attention`), save for the facts and a few stretches; with `full` documents all
rows see everything, as in use. Weights are bfloat16 with float32 masters in the optimizer, on a CPU and on a GPU alike.
"""

import argparse
import collections
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from batches import ANSWER, COPY, FIRST, PHRASE, Example, Source, examples, pack
from context_attention import NAME, register
from initial import new_model
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

PAD = 1
ALONE = 0.75  # share of steps whose questions are asked alone, as most are in use; in the others in turn
QUESTION_KEYS = 128 * 1024  # questions about a long document x its tokens: what a step can afford
DOCUMENT = 4096  # a longer one is made of this much with facts and of stored filler


@dataclass(frozen=True)
class Stage:
    """What one step is made of, and when to go on: after `steps`, or when the accuracy of answers passes `until`."""

    name: str
    steps: int
    rate: float
    short: tuple[tuple[int, int], ...]  # (length, rows), one drawn per step
    long: tuple[int, ...] = ()  # lengths, one drawn per step
    full: float = 0.0  # share of long documents whose rows all see everything
    until: float = 2.0
    final_rate: float | None = None


STAGES = (
    Stage("near", 250, 8e-4, ((512, 8),), until=0.9),
    Stage("text", 200, 8e-4, ((512, 8), (1024, 4)), until=0.95),
    Stage("farther", 760, 8e-4, ((512, 8), (512, 8), (1024, 4)), (4096, 4096, 8192, 16384, 32768), final_rate=3e-5),
    Stage("farthest", 200, 4e-4, ((512, 8), (1024, 4)), (4096, 8192, 16384, 32768, 32768), final_rate=1e-5),
    Stage("lists", 640, 7e-4, ((512, 8), (512, 8), (1024, 4)), (4096, 8192, 16384, 32768), final_rate=1e-5),
)


class Trainer:
    """Model, float32 masters and the counters that make a run resumable."""

    def __init__(self, model: LlamaForCausalLM, device: str) -> None:
        register()
        self.device = device
        self.model = model.to(device=device, dtype=torch.bfloat16)
        self.model.config._attn_implementation = NAME
        self.masters = [p.detach().float().clone() for p in self.model.parameters()]
        # the embeddings (first) move slowly: words that training never asks for must stay as distinct as the others
        groups = [{"params": self.masters[:1], "scale": 0.3}, {"params": self.masters[1:], "scale": 1.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
        self.recent: dict[str, collections.deque[float]] = collections.defaultdict(lambda: collections.deque(maxlen=24))
        self.stored: list[tuple[Tensor, Tensor]] = []
        self.stage, self.step, self.total = 0, 0, 0

    def loss(self, hidden: Tensor, tokens: Tensor, weights: Tensor, rows: list[Example], label: str) -> Tensor:
        """hidden [B, T, h] before tokens [B, T] with weights [B, T] -> the weighted mean; notes the accuracies."""
        thinned = torch.where((weights < 0.2) & (torch.rand_like(weights) > 0.1), 0.0, weights)
        chosen = thinned > 0
        logits = self.model.lm_head(hidden[chosen]).float()
        target, weight = tokens[chosen], thinned[chosen]
        hit = logits.argmax(-1) == target
        for name, kind in (("phrase", PHRASE), ("rest", ANSWER)):
            if (own := weight == kind).any():
                self.recent[name].append(hit[own].float().mean().item())
        counted = (weight == FIRST) | (weight == COPY)
        place = torch.nonzero(chosen)[:, 0]
        for index, row in enumerate(rows):
            if (own := counted & (place == index)).any():
                accuracy = hit[own].float().mean().item()
                self.recent[label].append(accuracy)
                self.recent[row.task].append(accuracy)
        return (cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()

    def short(self, rows: list[Example], length: int) -> None:
        """One forward and backward pass over whole rows."""
        batch = pack(rows, length + 1, PAD)
        tokens, weights = batch.tokens.to(self.device), batch.weights.to(self.device)
        hidden = self.model.model(
            tokens[:, :-1],
            position_ids=batch.positions[:, :-1].to(self.device),
            blocks=batch.blocks[:, :-1].to(self.device) if any(row.alone for row in rows) else None,
            use_cache=False,
        ).last_hidden_state
        self.loss(hidden, tokens[:, 1:], weights[:, 1:], rows, f"{length}").backward()

    def long(self, row: Example, length: int, full: bool, rng: random.Random) -> None:
        """The document once without gradients, then its questions and answers behind it. A document that is shorter
        than `length` is set somewhere into stored filler, so that the whole is `length` long."""
        document = torch.tensor([row.document], device=self.device)
        events = None if full else self._events(row, rng)
        size, total = len(row.document), length - len(row.turns)
        at = rng.randrange(2, total - size) if self.stored and not full and total > size + 512 else 2
        places = torch.cat([torch.arange(2), torch.arange(at, at + size - 2)])[None].to(self.device)
        with torch.no_grad():
            cache = self.model.model(document, position_ids=places, use_cache=True, events=events).past_key_values
            if at > 2:
                for layer, (k, v) in zip(cache.layers, self.stored, strict=True):
                    layer.keys = splice(layer.keys, k, at, total)
                    layer.values = splice(layer.values, v, at, total)
        turns = torch.tensor([row.turns], device=self.device)
        weights = torch.tensor([row.turn_weights], device=self.device)
        positions = torch.tensor([row.positions(cache.get_seq_length())], device=self.device)
        blocks = torch.tensor([row.blocks], device=self.device)[:, :-1] if row.alone else None
        hidden = self.model.model(
            turns[:, :-1], position_ids=positions[:, :-1], past_key_values=cache, use_cache=True, blocks=blocks
        ).last_hidden_state
        label = f"{length}{'*' if full else ''}"
        self.loss(hidden, turns[:, 1:], weights[:, 1:], [row], label).backward()

    @torch.no_grad()
    def store(self, filler: list[int]) -> None:
        """Keep the keys and values of a long piece of filler, for `long` to set documents into."""
        tokens = torch.tensor([filler], device=self.device)
        events = torch.arange(len(filler) - 64, len(filler), device=self.device)[None]
        cache = self.model.model(tokens, use_cache=True, events=events)
        self.stored = [(layer.keys, layer.values) for layer in cache.past_key_values.layers]

    def _events(self, row: Example, rng: random.Random) -> Tensor:
        """Rows of the document that see everything: facts where they are few, and two stretches. [1, E]"""
        facts = [at for at, weight in enumerate(row.document_weights) if weight == 0.1]
        chosen = set(facts if len(facts) <= 384 else [])
        for _ in range(2):
            start = rng.randrange(len(row.document))
            chosen.update(range(start, min(start + 64, len(row.document))))
        return torch.tensor([sorted(chosen)], device=self.device)

    def update(self, rate: float) -> None:
        """One step of the optimizer on the masters with the mean gradient of all processes, copied into the model."""
        for master, weight in zip(self.masters, self.model.parameters(), strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        if distributed.is_initialized():
            together = torch.cat([master.grad.flatten() for master in self.masters if master.grad is not None])
            distributed.all_reduce(together)
            together /= distributed.get_world_size()
            for master, part in zip(self.masters, together.split([m.numel() for m in self.masters]), strict=True):
                master.grad = part.view_as(master)
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.model.parameters(), strict=True):
                weight.copy_(master)

    def save(self, folder: Path) -> None:
        state = {
            "masters": self.masters,
            "optimizer": self.optimizer.state_dict(),
            "place": (self.stage, self.step, self.total),
        }
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").rename(folder / "state.pt")

    @torch.no_grad()
    def begin_with(self, other: LlamaForCausalLM) -> None:
        """Take another model's weights, and go on with the last stage."""
        for master, weight, given in zip(self.masters, self.model.parameters(), other.parameters(), strict=True):
            master.copy_(given)
            weight.copy_(given)
        self.stage = len(STAGES) - 1

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=False)
        with torch.no_grad():
            for master, weight, saved in zip(self.masters, self.model.parameters(), state["masters"], strict=True):
                master.copy_(saved)
                weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage, self.step, self.total = state["place"]


def splice(own: Tensor, filler: Tensor, at: int, total: int) -> Tensor:
    """Keys or values [1, G, n, d], all but the first two set into stored filler at `at` -> [1, G, total, d]."""
    rest = at + own.shape[2] - 2
    return torch.cat([own[:, :, :2], filler[:, :, 2:at], own[:, :, 2:], filler[:, :, rest:total]], 2)


def rate_of(stage: Stage, step: int, total: int) -> float:
    """Warm-up over the first 40 steps of the run, then the stage's rate, falling in a line where it says so."""
    rate = stage.rate
    if stage.final_rate is not None:
        rate += (stage.final_rate - stage.rate) * step / stage.steps
    return rate * min(1.0, (total + 1) / 40)


def run_step(trainer: Trainer, stage: Stage, source: Source, seed: str, rank: int) -> None:
    """One step; its randomness follows from the seed and the step alone, so a run that is resumed goes on as it would
    have. All processes draw the same lengths, so that none waits for another, and other examples."""
    shared, own = random.Random(f"{seed}/{trainer.total}"), random.Random(f"{seed}/{trainer.total}/{rank}")
    torch.manual_seed(own.randrange(1 << 40))
    length, count = shared.choice(stage.short)
    alone = shared.random() < ALONE
    stream = examples(source, own, length, length // 64, alone)
    trainer.short([next(stream) for _ in range(count)], length)
    if stage.long:
        length, full = shared.choice(stage.long), shared.random() < stage.full
        if not trainer.stored or (not full and max(stage.long) > DOCUMENT and trainer.total % 24 == 0):
            filler = source.facts if trainer.total % 48 == 24 else source.text
            trainer.store(filler(own, max(stage.long) + 64))
        questions = max(4, min(24, QUESTION_KEYS // length))
        row = next(examples(source, own, length if full else min(length, DOCUMENT), questions, alone))
        trainer.long(row, length, full, own)
    trainer.update(rate_of(stage, trainer.step, trainer.total))


def agree(values: list[float]) -> list[float]:
    """The mean of each value over all processes."""
    if not distributed.is_initialized():
        return values
    together = torch.tensor(values)
    distributed.all_reduce(together)
    means: list[float] = (together / distributed.get_world_size()).tolist()
    return means


def run(trainer: Trainer, source: Source, work: Path, seed: str, rank: int) -> None:
    """Steps until the last stage is done or the process is asked to end; rank 0 writes and prints."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    start = saved = time.time()
    while trainer.stage < len(STAGES):
        stage = STAGES[trainer.stage]
        run_step(trainer, stage, source, seed, rank)
        trainer.step, trainer.total = trainer.step + 1, trainer.total + 1
        means = {name: sum(values) / len(values) for name, values in sorted(trainer.recent.items())}
        accuracy, stop = agree([min(mean for name, mean in means.items() if name[0].isdigit()), float(bool(stopping))])
        if rank == 0 and trainer.total % 10 == 0:
            shown = " ".join(f"{name}:{mean:.3f}" for name, mean in means.items())
            print(f"{stage.name} {trainer.step}/{trainer.total} {time.time() - start:.0f}s {shown}", flush=True)
        done = trainer.step >= stage.steps or (trainer.step > 40 and accuracy > stage.until)
        if done:
            trainer.stage, trainer.step = trainer.stage + 1, 0
            trainer.recent.clear()
        if rank == 0 and (done or stop or time.time() - saved > 120):
            trainer.save(work)
            trainer.model.save_pretrained(work / (stage.name if done else "latest"))
            saved = time.time()
        if stop:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; a state there is resumed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="start from random weights, without the written circuits")
    parser.add_argument("--start", type=Path, help="a checkpoint of this shape to start from, at the last stage")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    source = Source(args.corpus, "train", extra_words=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(new_model(source.tokenizer.get_vocab_size(), source.end, args.seed, not args.plain), device)
    if (args.work / "state.pt").exists():
        trainer.load(args.work)
    elif args.start is not None:
        trainer.begin_with(LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32))
    run(trainer, source, args.work, str(args.seed), rank)


if __name__ == "__main__":
    main()
