"""From prompts to tensors: tokens, and how much each of them counts in the loss."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from gossamer.attention.profiling.tasks import TASKS, Filler, Prompt, Question, Split, Task, Words, make_prompt

# Weights: the first token of a referenced string, or of a key in an answer about several (what has to be found), the
# other tokens of referenced strings, the rest of answers (keys must be copied too), repeated chunks, facts, filler.
FIRST, ANSWER, PHRASE, COPY, FACT, TEXT = 24.0, 6.0, 5.0, 1.5, 0.1, 0.03
MIXED = (
    Task("mixed", keys=6, repeated=1, chains=1),
    Task("mixed_small", keys=4, repeated=0, chains=1, hops=3),
    Task("mixed_letters", keys=6, repeated=1, values=3, chains=1, letters=True),
    Task("many", keys=16),
    Task("crowd", keys=40),
    Task("some", keys=6),
    Task("several", keys=12, together=4),
    Task("repeated", repeated=3, values=4),
    Task("chains", chains=3),
    Task("links", chains=6, hops=1),
    Task("links_letters", chains=6, hops=1, letters=True),
    Task("chain_letters", chains=2, hops=3, letters=True),
)


@dataclass(frozen=True)
class Example:
    """A document [D] and its questions and answers [Q] as tokens, the weight of each in the loss, and for each token
    of the turns the question it belongs to (1, 2, ...), or 0 throughout where they are asked in turn."""

    task: str
    document: list[int]
    document_weights: list[float]
    turns: list[int]
    turn_weights: list[float]
    blocks: list[int]

    @property
    def alone(self) -> bool:
        """Whether each question is asked alone: none sees another, all follow the document at once."""
        return self.blocks[0] > 0

    def positions(self, start: int) -> list[int]:
        """The place of each token of the turns behind a document that ends before `start`."""
        if not self.alone:
            return list(range(start, start + len(self.turns)))
        first = {block: index for index, block in reversed(list(enumerate(self.blocks)))}
        return [start + index - first[block] for index, block in enumerate(self.blocks)]


class Source:
    """Makes examples of one split; a pool of fillers, each some files long, is built once."""

    def __init__(self, corpus: Path, split: Split, extra_words: bool) -> None:
        self.tokenizer = Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))
        self.bos, self.user, self.assistant, self.end = (
            self.tokenizer.token_to_id(f"<|{name}|>") for name in ("bos", "user", "assistant", "end")
        )
        self.split: Split = split
        self.encode = lru_cache(maxsize=400_000)(self._encode)
        text = (corpus / f"{split}.txt").read_text(encoding="utf-8")
        self.filler = Filler(text.replace("\0", "\n").split("\n"), self._encode)
        self.words = Words.of(split)
        self.wild = self._wild_words(text) if extra_words else self.words

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def _wild_words(self, text: str) -> Words:
        """Words of the text beside the lists, so that keys are not known by heart; none of the held-out ones."""
        held = Words.of("eval")
        seen = {word for word in text[:8_000_000].split() if word.isascii() and word.isalpha() and word.islower()}
        free = sorted(word for word in seen if 3 <= len(word) <= 9 and word not in held.adjectives + held.nouns)
        random.Random(1).shuffle(free)
        return Words(self.words.adjectives + tuple(free[:3000]), self.words.nouns + tuple(free[3000:6000]))

    def text(self, rng: random.Random, length: int) -> list[int]:
        """Plain filler of `length` tokens or a few less, begun as a document is."""
        lines = self.filler.take(rng, length - 2)
        return [self.bos, self.user, *(token for line in lines for token in self.encode(line))]

    def facts(self, rng: random.Random, length: int) -> list[int]:
        """A document of `length` tokens or a few less that is all facts."""
        prompt = make_prompt(
            TASKS["pairs"], length, rng.randrange(1 << 40), self.filler, split=self.split, words=self.wild, reserve=0
        )
        return [self.bos, self.user, *(token for line in prompt.lines for token in self.encode(line))]

    def example(self, task: Task, length: int, seed: int, questions: int, alone: bool) -> Example:
        words = self.wild if seed % 3 else self.words
        prompt = make_prompt(
            task, length, seed, self.filler, split=self.split, words=words, questions=questions, reserve=8
        )
        return self.tokens(prompt, alone)

    def tokens(self, prompt: Prompt, alone: bool) -> Example:
        document, weights_of_document = [self.bos, self.user], [0.0, 0.0]
        for index, line in enumerate(prompt.lines):
            ids = self.encode(line)
            document += ids
            weights_of_document += [FACT if index in prompt.fact_lines else TEXT] * len(ids)
        turns: list[int] = []
        turn_weights: list[float] = []
        blocks: list[int] = []
        for index, question in enumerate(prompt.questions):
            opens = alone or index == 0
            ask = self.encode(f"\n{question.text}") if opens else [self.user, *self.encode(question.text)]
            ids, weights = self._answer(question)
            turns += [*ask, self.assistant, *ids]
            turn_weights += [0.0] * (len(ask) + 1) + weights
            blocks += [index + 1 if alone else 0] * (len(turns) - len(blocks))
        return Example(prompt.task, document, weights_of_document, turns, turn_weights, blocks)

    def _answer(self, question: Question) -> tuple[list[int], list[float]]:
        """The tokens of the answer with its end, and their weights."""
        answer = self.tokenizer.encode(question.answer)
        spans = [(question.answer.index(text), len(text)) for text in question.references]
        weights: list[float] = []
        for start, stop in answer.offsets:
            inside = any(start < at + size and stop > at for at, size in spans)
            first = any(start <= at < stop for at, _ in spans)
            first |= question.answer[:start].rstrip(' "').endswith(")")  # which of several keys is next
            weights.append(FIRST if first else ANSWER if inside else PHRASE)
        return [*answer.ids, self.end], [*weights, PHRASE]


def tasks_for(rng: random.Random, length: int) -> Task:
    """A task that fits the length; in short rows, where they cost least, more chains, which are learned last."""
    mixed = {task.name: task for task in MIXED}
    if length <= 512:
        names = ["mixed_small", "some", "some", "links", "links_letters", "chain_letters"]
        plain = ["pairs", "pairs", "variables", "multiquery", "multivalue"]
        return rng.choice([*(mixed[name] for name in names), *(TASKS[name] for name in plain)])
    names = [
        "many",
        "crowd",
        "crowd",
        "some",
        "several",
        "mixed",
        "mixed_letters",
        "repeated",
        "chain_letters",
        "links",
    ]
    plain = ["single", "pairs", "pairs", "pairs", "multiquery", "multivalue", "variables"]
    return rng.choice([*(mixed[name] for name in names), *(TASKS[name] for name in plain)])


def repeats(source: Source, rng: random.Random, length: int) -> Example:
    """Chunks of random tokens that come back at random places: what follows is known from the chunk's second token on.
    This is how every token of the vocabulary learns to be copied, not only those that answers happen to hold."""
    size = source.tokenizer.get_vocab_size()
    pool: list[list[int]] = []
    turns: list[int] = []
    weights: list[float] = []
    while len(turns) < length:
        if pool and rng.random() < 0.6:
            chunk = rng.choice(pool[-6:])
            weights += [0.0] + [COPY] * (len(chunk) - 1)
        else:
            chunk = [rng.randrange(6, size) for _ in range(rng.randint(3, 16))]
            pool.append(chunk)
            weights += [0.0] * len(chunk)
        turns += chunk
    return Example("repeats", [source.bos], [0.0], turns, weights, [1] * len(turns))


def examples(source: Source, rng: random.Random, length: int, questions: int, alone: bool) -> Iterator[Example]:
    """Endless examples whose documents and questions together have at most `length` tokens."""
    while True:
        if length <= 1024 and rng.random() < 0.2:
            yield repeats(source, rng, length)
            continue
        room = length - min(questions * 32, length // 2)
        try:
            yield source.example(tasks_for(rng, length), room, rng.randrange(1 << 40), questions, alone)
        except ValueError:  # a task too large for this room: draw again
            continue


@dataclass(frozen=True)
class Batch:
    """Rows of whole examples cut or padded to one length T: tokens, weights, positions and blocks, all [B, T]."""

    tokens: Tensor
    weights: Tensor
    positions: Tensor
    blocks: Tensor


def pack(rows: list[Example], length: int, pad: int) -> Batch:
    """Documents belong to block 0, which every question sees."""
    batch = Batch(
        torch.full((len(rows), length), pad),
        torch.zeros(len(rows), length),
        torch.zeros(len(rows), length, dtype=torch.long),
        torch.zeros(len(rows), length, dtype=torch.long),
    )
    for place, row in enumerate(rows):
        start = len(row.document)
        size = min(start + len(row.turns), length)
        batch.tokens[place, :size] = torch.tensor((row.document + row.turns)[:size])
        batch.weights[place, :size] = torch.tensor((row.document_weights + row.turn_weights)[:size])
        batch.positions[place, :size] = torch.tensor([*range(start), *row.positions(start)][:size])
        batch.blocks[place, :size] = torch.tensor([0] * start + row.blocks)[:size]
    return batch
