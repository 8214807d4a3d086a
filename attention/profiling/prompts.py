"""Documents in tokens: what profiling reads, with questions whose answers are known and where these answers stand."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gossamer.attention.profiling.tasks import TASKS, Filler, Message, Prompt, Split, Task, make_prompt

RESERVED = 160  # tokens of a length that are left for the chat template and the answer
TEXT = "text"  # the task of reading on in plain text
READ_ON = 64  # tokens of a plain text that count as generated
ASKED = (TASKS["single"], TASKS["multikey"], TASKS["multiquery"], TASKS["pairs"], TASKS["variables"])


class Speech(Protocol):
    """How the model's text becomes tokens."""

    @property
    def has_chat_template(self) -> bool: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Message]) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and its right answer: `tokens`, of which `prompt` were asked, from `question` on after the document.
    references: ranges of `tokens`, each spelling a string that a right answer has to hold."""

    tokens: tuple[int, ...]
    question: int
    prompt: int
    references: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> range:
        """The positions that predict the answer's tokens."""
        return range(self.prompt - 1, len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class Document:
    """Exchanges with a common beginning, which makes nearly all of their length."""

    task: str
    length: int
    seed: int
    split: Split
    exchanges: tuple[Exchange, ...]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.task}-{self.length}-{self.seed}"

    @property
    def room(self) -> int:
        """Tokens that a cache needs to hold all of it."""
        longest = max(len(each.tokens) for each in self.exchanges)
        return longest + sum(len(each.tokens) - each.question + 128 for each in self.exchanges)


def make_documents(
    tasks: Sequence[Task],
    length: int,
    seeds: Iterable[int],
    filler: Filler,
    speech: Speech,
    *,
    split: Split,
    questions: int,
) -> list[Document]:
    """One document per seed and task, and per seed a plain text, each of about `length` tokens. Raises ValueError where
    a task does not fit into so few."""
    documents = []
    for seed in seeds:
        for task in tasks:
            prompt = make_prompt(task, length, seed, filler, split=split, questions=questions, reserve=RESERVED)
            asked = tuple(_exchange(prompt, n, speech) for n in range(len(prompt.questions)))
            documents.append(Document(task.name, length, seed, split, asked))
        documents.append(_plain(length, seed, filler, speech, split))
    return documents


def _exchange(prompt: Prompt, number: int, speech: Speech) -> Exchange:
    question = prompt.questions[number]
    if speech.has_chat_template:
        asked = speech.encode_chat(prompt.messages(number))
    else:
        asked = speech.encode(f"{prompt.user_text(number)}\nAnswer: ")
    answer = speech.encode(question.answer, add_special_tokens=False)
    ends = [len(speech.decode(answer[:n])) for n in range(len(answer) + 1)]
    found = []
    for reference in question.references:
        first = question.answer.index(reference)
        spelled = [n for n in range(len(answer)) if ends[n + 1] > first and ends[n] < first + len(reference)]
        found.append((len(asked) + spelled[0], len(asked) + spelled[-1] + 1))
    after = len(speech.encode(question.text, add_special_tokens=False)) + 8  # what the template adds behind it
    return Exchange((*asked, *answer), max(0, len(asked) - after), len(asked), tuple(found))


def _plain(length: int, seed: int, filler: Filler, speech: Speech, split: Split) -> Document:
    """Consecutive lines; the last tokens count as generated."""
    lines = filler.take(random.Random(f"{split}/{TEXT}/{length}/{seed}"), length - 8)
    tokens = speech.encode("".join(lines))[: length - 8]
    prompt = len(tokens) - min(READ_ON, len(tokens) // 2)
    return Document(TEXT, length, seed, split, (Exchange(tuple(tokens), len(tokens), prompt, ()),))
