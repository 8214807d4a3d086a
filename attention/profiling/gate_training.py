"""Gates for a whole model: lessons from some documents, then a gate for each layer and phase."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.capture import capture
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.gates import GateWeights, Lesson, distil, divergence, lesson, write_gates
from gossamer.attention.profiling.profile import Settings
from gossamer.attention.profiling.state import State
from gossamer.attention.profiling.subject import CALIBRATED, Progress, Subject
from gossamer.attention.step import TILE_ROWS
from gossamer.kvcache.summaries import Rotary

BLOCKS, QUERIES = 32, 64  # query blocks and single queries that each document teaches
NEAR = 96  # tokens before the answer whose blocks are always taught: those of the question
EARLIEST = 256  # before this there is nothing to choose
STEPS = 600  # of training, for each gate
HELD_OUT = 5  # every so many documents one is kept back


def rotary_of(module: nn.Module) -> Rotary | None:
    """The model's rotary embedding, where it has exactly one for all layers."""
    found: list[Any] = [each for each in module.modules() if isinstance(getattr(each, "inv_freq", None), Tensor)]
    if len(found) != 1:
        return None
    return Rotary(found[0].inv_freq.float(), float(getattr(found[0], "attention_scaling", 1.0)))


def places(rng: random.Random, count: int, length: int, reply: int, size: int) -> list[int]:
    """Where query blocks of `size` begin: at and just before the reply, and anywhere."""
    near = range(max(0, reply - NEAR) // size * size, length, size)
    anywhere = rng.sample(range(EARLIEST // size, length // size), min(count, (length - EARLIEST) // size))
    return sorted({*near, *(place * size for place in anywhere)})


def train_gates(subject: Subject, settings: Settings, state: State, progress: Progress, path: Path) -> None:
    """Distil gates from the documents of the shortest length, and write them. Raises ValueError for a model whose
    layers turn in different ways, or not at all."""
    rotary = rotary_of(subject.module)
    if rotary is None:
        raise ValueError(
            "gates need one rotary embedding for all layers, which this model has not; leave --train-gates out"
        )
    layers = range(subject.shape.layers)
    weights = state.tensors("gates", lambda: _train(subject, settings, progress, rotary))

    def of(layer: int) -> dict[Phase, GateWeights]:
        names = {phase: f"{layer}.{phase}" for phase in PHASES}
        return {phase: GateWeights(weights[f"{n}.query"], weights[f"{n}.key"]) for phase, n in names.items()}

    write_gates(path, [of(layer) for layer in layers], rotary, rotary)


def _train(subject: Subject, settings: Settings, progress: Progress, rotary: Rotary) -> dict[str, Tensor]:
    documents = subject.documents(settings, min(settings.lengths), CALIBRATED)
    lessons: dict[Phase, list[list[Lesson]]] = {phase: [] for phase in PHASES}  # [document][layer]
    sizes: dict[Phase, tuple[int, int]] = {
        "prefill": (max(1, TILE_ROWS // subject.shape.ratio), BLOCKS),
        "decode": (1, QUERIES),
    }
    progress.begin("lessons for gates", len(documents))
    for document in documents:
        exchange = document.exchanges[0]
        tokens = torch.tensor(exchange.tokens, device=subject.shape.device)
        read = capture(subject.module, tokens, subject.dense(), subject.chunk)
        rng = random.Random(document.seed)
        for phase, (size, count) in sizes.items():
            first = places(rng, count, len(exchange.tokens), exchange.prompt, size)
            lessons[phase].append([lesson(layer, rotary, first, size) for layer in read])
        progress.tick()
    progress.begin("gates", subject.shape.layers)
    weights: dict[str, Tensor] = {}
    for layer in range(subject.shape.layers):
        for phase, taught in lessons.items():
            own = [each[layer] for n, each in enumerate(taught) if len(taught) < HELD_OUT or (n + 1) % HELD_OUT]
            kept = [each[layer] for n, each in enumerate(taught) if (n + 1) % HELD_OUT == 0] or own
            gate = distil(own, rotary, STEPS, seed=settings.seed)
            before, after = (_far(each, rotary, kept) for each in (distil(own, rotary, 0), gate))
            progress.say(f"gate of layer {layer}, {phase}: {before:.3f} nats from dense untrained, {after:.3f} trained")
            weights |= {f"{layer}.{phase}.query": gate.query, f"{layer}.{phase}.key": gate.key}
        progress.tick()
    return weights


def _far(gate: GateWeights, rotary: Rotary, lessons: Sequence[Lesson]) -> float:
    return sum(float(divergence(gate, rotary, each)) for each in lessons) / len(lessons)


def gates_against_pooled_keys(
    candidates: Mapping[Phase, Sequence[Candidate]], found: Mapping[Phase, Mapping[int, Found]], length: int
) -> dict[Phase, tuple[float, float]] | None:
    """By phase the recall of gates and of mean keys under the same budgets, mean over budgets, heads and layers; None
    without gates."""
    answer: dict[Phase, tuple[float, float]] = {}
    for phase, own in candidates.items():
        budgets = {c.backend.budget: n for n, c in enumerate(own) if c.backend.backend == "learned-gate"}
        pooled = {
            c.backend.budget: n
            for n, c in enumerate(own)
            if c.backend.backend == "block-sparse" and c.backend.score == "mean" and not c.backend.correct_dropped
        }
        both = [budget for budget in budgets if budget in pooled]
        if not both:
            return None
        recall = found[phase][length].recall.mean((1, 2))
        means = [sum(float(recall[table[b]]) for b in both) / len(both) for table in (budgets, pooled)]
        answer[phase] = means[0], means[1]
    return answer
