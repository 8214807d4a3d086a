"""Training texts in which some tokens can be told only from far away: questions about facts hidden in filler."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.attention.profiling.tasks import Filler, Message, Task, make_prompt

RESERVE = 64  # tokens for each question with its answer, before it is known what they take


@dataclass(frozen=True, slots=True)
class TrainingText:
    """tokens [T] int64; decisive [T] bool: where the final states choose a token of an answer."""

    tokens: Tensor
    decisive: Tensor


@dataclass(frozen=True, slots=True)
class Passkeys:
    """Training texts by number: `keys` facts at random places in filler, and all their questions with the answers at
    the end, in turn; `shortest` to `longest` tokens, drawn evenly, to within some words. `encode_chat` makes tokens
    of a chat by the model's template; whether it opens a further reply at the end does not matter."""

    filler: Filler
    encode_chat: Callable[[list[Message]], Sequence[int]]
    shortest: int
    longest: int
    keys: int = 10
    seed: int = 0

    def __call__(self, number: int) -> TrainingText:
        """Raises ValueError where the facts do not fit into the length, or the chat template loses an answer."""
        rng = random.Random(f"{self.seed}/{number}")
        length, seed = rng.randint(self.shortest, self.longest), rng.randrange(2**32)
        reserve = RESERVE * self.keys
        spare = length - len(self.encode_chat(self._chat(length, seed, reserve)))
        ids, answers = find_answers(self._chat(length, seed, reserve - spare), self.encode_chat)
        decisive = torch.zeros(len(ids), dtype=torch.bool)
        for answer in answers:
            decisive[answer.start - 1 : answer.stop - 1] = True
        return TrainingText(torch.tensor(ids), decisive)

    def _chat(self, length: int, seed: int, reserve: int) -> list[Message]:
        task = Task("passkeys", keys=self.keys)
        prompt = make_prompt(task, length, seed, self.filler, split="train", questions=self.keys, reserve=reserve)
        return prompt.conversation()


def find_answers(
    chat: list[Message], encode_chat: Callable[[list[Message]], Sequence[int]]
) -> tuple[list[int], list[range]]:
    """The chat's token ids, and which of them are each reply's.

    Found by writing another reply in its place: this needs to know neither the template nor where the tokenizer cuts.
    Raises ValueError where the ids do not change, or in no place of their own.
    """
    ids = list(encode_chat(chat))
    found: list[range] = []
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        other = [*chat[:turn], {**message, "content": _altered(message["content"])}, *chat[turn + 1 :]]
        changed = list(encode_chat(other))
        start = _shared_beginning(ids, changed)
        stop = len(ids) - _shared_beginning(ids[::-1], changed[::-1])
        if not (found[-1].stop if found else 1) <= start < stop:
            raise ValueError("the chat template does not show each reply once and in order, so none can be trained on")
        found.append(range(start, stop))
    return ids, found


def _altered(text: str) -> str:
    """The text with each letter and digit replaced by the next one."""
    before = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    after = "1234567890bcdefghijklmnopqrstuvwxyzaBCDEFGHIJKLMNOPQRSTUVWXYZA"
    return text.translate(str.maketrans(before, after))


def _shared_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many entries from the first on are equal."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
