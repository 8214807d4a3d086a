"""Gates for a whole model: lessons from some documents, then a gate for each layer and phase."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.gates import GateWeights, Lesson, distil, divergence, make_lesson, write_gates
from gossamer.attention.profiling.profile import GateRecall, Settings
from gossamer.attention.profiling.prompts import Document
from gossamer.attention.profiling.reading import LayerCall, Reader
from gossamer.attention.profiling.state import State
from gossamer.attention.profiling.subject import CALIBRATED, Progress, Subject
from gossamer.attention.step import TILE_ROWS
from gossamer.kernels.layout import PAGE_SIZE
from gossamer.kernels.rotary import Rotary

BLOCKS, QUERIES = 32, 64  # query blocks and single queries that each document teaches
NEAR = 96  # tokens before the answer whose blocks are always taught: those of the question
EARLIEST = 256  # before this there is nothing to choose
STEPS = 600  # of training, for each gate
LONGEST = 32768  # tokens of a document that teaches; longer ones only where no length is shorter
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
    """Distil gates from the documents of all lengths up to LONGEST, and write them. Raises ValueError for a model whose
    layers turn in different ways, or not at all."""
    rotary = rotary_of(subject.module)
    if rotary is None:
        raise ValueError(
            "gates need one rotary embedding for all layers, which this model has not; leave --train-gates out"
        )
    weights = state.tensors("gates", lambda: _train(subject, settings, progress, rotary))

    def of(layer: int) -> dict[Phase, GateWeights]:
        names = {phase: f"{layer}.{phase}" for phase in PHASES}
        return {phase: GateWeights(weights[f"{n}.query"], weights[f"{n}.key"]) for phase, n in names.items()}

    free = subject.shape.free
    write_gates(path, [of(layer) if layer in free else {} for layer in range(subject.shape.layers)], rotary, rotary)


@dataclass(slots=True)
class Lessons:
    """Looks on while a text of `length` tokens is read, and keeps for each layer a lesson of each phase: the queries of
    some blocks as they pass, and what they should choose when the last keys have come."""

    rotary: Rotary
    length: int
    layers: Sequence[int]  # that are taught
    sizes: Mapping[Phase, int]
    first: Mapping[Phase, Sequence[int]]  # where blocks begin
    found: dict[Phase, dict[int, Lesson]] = field(default_factory=dict)  # by layer
    _blocks: dict[tuple[Phase, int], list[Tensor]] = field(default_factory=dict)

    def layer(self, call: LayerCall) -> None:
        (span,) = call.step.spans
        if call.layer not in self.layers:
            return
        for phase, first in self.first.items():
            own = self._blocks.setdefault((phase, call.layer), [])
            for begin in first:
                if span.first <= begin < span.first + span.new:
                    at = begin - span.first
                    own.append(call.q[at : at + self.sizes[phase]].clone())
            if span.first + span.new == self.length:
                keys = self._keys(call)
                lessons = self.found.setdefault(phase, {})
                lessons[call.layer] = make_lesson(own, keys, call.scale, self.rotary, first)
                del self._blocks[phase, call.layer]

    def _keys(self, call: LayerCall) -> Tensor:
        """[T, G, D]"""
        (kv,) = call.step.views.layer(call.layer)
        pages = kv.table[0, : -(-self.length // PAGE_SIZE)].long()
        return kv.k[:, pages].flatten(1, 2)[:, : self.length].transpose(0, 1)


def _train(subject: Subject, settings: Settings, progress: Progress, rotary: Rotary) -> dict[str, Tensor]:
    lengths = [length for length in settings.lengths if length <= LONGEST] or [min(settings.lengths)]
    documents = [each for length in lengths for each in subject.documents(settings, length, CALIBRATED)]
    taught: list[Lessons] = []
    progress.begin("lessons for gates", len(documents))
    for document in documents:
        taught.append(_teach(subject, document, rotary))
        progress.tick()
    progress.begin("gates", len(subject.shape.free))
    weights: dict[str, Tensor] = {}
    for layer in subject.shape.free:
        for phase in PHASES:
            lessons = [each.found[phase][layer] for each in taught]
            own = [each for n, each in enumerate(lessons) if len(lessons) < HELD_OUT or (n + 1) % HELD_OUT]
            kept = [each for n, each in enumerate(lessons) if (n + 1) % HELD_OUT == 0] or own
            gate = distil(own, rotary, STEPS, seed=settings.seed)
            before, after = (_far(each, rotary, kept) for each in (distil(own, rotary, 0), gate))
            progress.say(f"gate of layer {layer}, {phase}: {before:.3f} nats from dense untrained, {after:.3f} trained")
            weights |= {f"{layer}.{phase}.query": gate.query, f"{layer}.{phase}.key": gate.key}
        progress.tick()
    return weights


def _teach(subject: Subject, document: Document, rotary: Rotary) -> Lessons:
    exchange = document.exchanges[0]
    length, rng = len(exchange.tokens), random.Random(document.seed)
    sizes: dict[Phase, int] = {"prefill": max(1, TILE_ROWS // subject.shape.ratio), "decode": 1}
    counts: dict[Phase, int] = {"prefill": BLOCKS, "decode": QUERIES}
    # a block that ends in another chunk would be cut: chunks are whole blocks, but for the last
    first = {phase: places(rng, counts[phase], length, exchange.prompt, size) for phase, size in sizes.items()}
    lessons = Lessons(rotary, length, subject.shape.free, sizes, first)
    reader = Reader(
        subject.module, subject.dense(), room=document.room, chunk=subject.chunk, shape=subject.shape, watcher=lessons
    )
    reader.read(exchange.tokens, prompt=length, rows=())
    return lessons


def _far(gate: GateWeights, rotary: Rotary, lessons: Sequence[Lesson]) -> float:
    return sum(float(divergence(gate, rotary, each)) for each in lessons) / len(lessons)


def gates_against_pooled_keys(
    candidates: Mapping[Phase, Sequence[Candidate]], found: Mapping[Phase, Mapping[int, Found]], length: int
) -> dict[Phase, GateRecall] | None:
    """By phase; None without gates."""
    answer: dict[Phase, GateRecall] = {}
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
        recall = found[phase][length].recall
        answer[phase] = GateRecall(*(recall[[table[b] for b in both]].mean(0) for table in (budgets, pooled)))
    return answer
