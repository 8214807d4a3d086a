"""The model that is profiled, and who is told how far it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from gossamer.attention.policy import AttentionPolicy, dense_policy
from gossamer.attention.policy_file import ModelEntry
from gossamer.attention.profiling.profile import Settings
from gossamer.attention.profiling.prompts import ASKED, Document, Speech, make_documents
from gossamer.attention.profiling.reading import Shape
from gossamer.attention.profiling.tasks import Filler, Split

CALIBRATED, SEARCHED, UNSEEN = 0, 1000, 2000  # where the seeds of documents for each purpose begin


class Progress(Protocol):
    """Who shows how far it is."""

    def begin(self, stage: str, total: int) -> None: ...
    def tick(self) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Subject:
    """fillers: text to hide facts in, for each split. rotary: rotary pairs of a head. chunk: tokens of a prompt that
    are computed at once."""

    module: nn.Module
    shape: Shape
    entry: ModelEntry
    speech: Speech
    fillers: Mapping[Split, Filler]
    rotary: int
    chunk: int

    def dense(self) -> AttentionPolicy:
        return dense_policy(self.shape.layers, self.shape.kv_heads)

    def documents(self, settings: Settings, length: int, first: int) -> list[Document]:
        """For a purpose: one for each task and seed, and a plain text per seed. Raises ValueError where a task does not
        fit into the length."""
        split: Split = "eval" if first == UNSEEN else "train"
        seeds = range(first + settings.seed, first + settings.seed + settings.documents)
        return make_documents(
            ASKED, length, seeds, self.fillers[split], self.speech, split=split, questions=settings.questions
        )
