"""What is learnt by reading under dense attention: label channels, what candidates do to heads, where heads look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling.calibrate import Calibration
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.findings import Found, add_up, flatten, unflatten
from gossamer.attention.profiling.heads import train_heads
from gossamer.attention.profiling.labels import ChannelProducts, write_labels
from gossamer.attention.profiling.passkeys import Passkeys
from gossamer.attention.profiling.profile import Settings
from gossamer.attention.profiling.prompts import Document
from gossamer.attention.profiling.reading import LayerCall, Reader
from gossamer.attention.profiling.state import State
from gossamer.attention.profiling.statistics import Looks, Statistics
from gossamer.attention.profiling.stopwatch import Stopwatch
from gossamer.attention.profiling.subject import CALIBRATED, Progress, Subject
from gossamer.attention.profiling.tasks import Message

STEPS, KEYS = 200, 6  # of training heads, and facts in each text


def rank_channels(subject: Subject, settings: Settings, state: State, progress: Progress, path: Path) -> None:
    """Writes the file with label channels; all documents of the shortest length count."""

    def rank() -> dict[str, Tensor]:
        documents = subject.documents(settings, min(settings.lengths), CALIBRATED)
        products = ChannelProducts(subject.rotary)
        progress.begin("label channels", len(documents))
        for document in documents:
            reader = Reader(
                subject.module,
                subject.dense(),
                room=document.room,
                chunk=subject.chunk,
                shape=subject.shape,
                watcher=products,
            )
            exchange = document.exchanges[0]
            reader.read(exchange.tokens, prompt=exchange.prompt, rows=())
            progress.tick()
        return {str(layer): channels for layer, channels in enumerate(products.ranked())}

    ranked = state.tensors("labels", rank)
    write_labels(path, [ranked[str(layer)] for layer in range(subject.shape.layers)])


def train_alphas(subject: Subject, settings: Settings, state: State, progress: Progress) -> Tensor:
    """DuoAttention's α of each head [layers, KV heads], on texts of up to the shortest length. Raises ValueError where
    the model's chat template shows no reply."""
    speech, longest = subject.speech, min(settings.lengths)

    def encode(chat: list[Message]) -> list[int]:
        if speech.has_chat_template:
            return speech.encode_chat(chat)
        return speech.encode("\n".join(message["content"] for message in chat))

    def train() -> dict[str, Tensor]:
        progress.begin("training of heads", STEPS)
        texts = Passkeys(subject.fillers["train"], encode, longest // 4, longest, keys=KEYS, seed=settings.seed)
        alpha = train_heads(subject.module, texts, steps=STEPS, report=lambda step, loss: progress.tick())
        return {"alpha": alpha}

    return state.tensors("heads", train)["alpha"]


@dataclass(frozen=True, slots=True)
class _Both:
    """Two who look on."""

    calibration: Calibration
    statistics: Statistics

    def layer(self, call: LayerCall) -> None:
        self.calibration.layer(call)
        self.statistics.layer(call)


def calibrate(
    subject: Subject,
    settings: Settings,
    candidates: Mapping[Phase, Sequence[Candidate]],
    artefacts: Artefacts,
    state: State,
    progress: Progress,
    stopwatch: Stopwatch,
) -> tuple[dict[Phase, dict[int, Found]], dict[int, Looks]]:
    """Every document of every length is read once, and each is a result of its own that is kept."""
    found: dict[Phase, dict[int, Found]] = {phase: {} for phase in PHASES}
    looks: dict[int, Looks] = {}
    for length in settings.lengths:
        documents = subject.documents(settings, length, CALIBRATED)
        progress.begin(f"calibration at {length} tokens", len(documents))
        read = []
        with stopwatch.stage(f"calibration at {length} tokens"):
            for document in documents:
                watcher = _Both(
                    Calibration(candidates, subject.shape, artefacts, document.seed),
                    Statistics(subject.shape, length, document.seed),
                )
                read.append(state.tensors(document.name, partial(_read, subject, document, watcher)))
                progress.tick()
        tables = [unflatten(each) for each in read]
        for phase in PHASES:
            found[phase][length] = add_up(each[phase] for each in tables)
        looks[length] = Looks.add_up(read)
    return found, looks


def _read(subject: Subject, document: Document, watcher: _Both) -> dict[str, Tensor]:
    reader = Reader(
        subject.module,
        subject.dense(),
        room=document.room,
        chunk=subject.chunk,
        shape=subject.shape,
        summaries=watcher.calibration.summaries,
        watcher=watcher,
    )
    exchange = document.exchanges[0]
    watcher.calibration.begin(exchange, subject.chunk)
    reader.read(exchange.tokens, prompt=exchange.prompt, rows=())
    return {**flatten(watcher.calibration.tables), **watcher.statistics.looks.flat()}
