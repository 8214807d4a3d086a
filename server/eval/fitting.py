"""Prompts of an exact number of tokens, counted with the model's own tokenizer and chat template."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gossamer.attention.profiling.tasks import Message
from gossamer.server.eval.question import EvalError, Question

ROUND_IT = 8  # tokens of a reply beside the answer itself


class Speech(Protocol):
    """How the model's text becomes tokens."""

    @property
    def has_chat_template(self) -> bool: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Message]) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about a document: its text, the strings of a right answer, and how deep the fact stands, 0 to 1."""

    text: str
    references: tuple[str, ...]
    any_counts: bool = False
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """A document and what is asked about it."""

    document: str
    asked: tuple[Asked, ...]

    def user_text(self, number: int) -> str:
        return f"{self.document}\n{self.asked[number].text}"


Build = Callable[[int], Content]  # from a size: more of it makes a longer document, about in proportion


def count_tokens(speech: Speech, user_text: str) -> int:
    """Of the whole prompt that asks `user_text`."""
    if speech.has_chat_template:
        return len(speech.encode_chat([{"role": "user", "content": user_text}]))
    return len(speech.encode(plain_prompt(user_text)))


def plain_prompt(user_text: str) -> str:
    """For a model without a chat template."""
    return f"{user_text}\nAnswer: "


def fit(speech: Speech, build: Build, *, task: str, length: int, most: int) -> Content:
    """The largest content whose longest prompt and a reply (see `reply_tokens`) make at most `length` tokens. Raises
    EvalError where the smallest does not fit."""

    def tokens(size: int) -> int:
        content = build(size)
        return reply_tokens(speech, content, most) + max(
            count_tokens(speech, content.user_text(number)) for number in _longest(speech, content)
        )

    least = tokens(0)
    if least > length:
        raise EvalError(
            f"The task {task} needs at least {least} tokens with this model's tokenizer, more than the {length} "
            "of --lengths; give a longer one, or leave the task out with --tasks."
        )
    return build(_largest(tokens, least, length))


def reply_tokens(speech: Speech, content: Content, most: int) -> int:
    """What a reply may have: `most`, or what a right answer needs where the tokenizer makes more of it."""
    needed = []
    for asked in content.asked:
        answers = asked.references if asked.any_counts else [", ".join(asked.references)]
        needed += [len(speech.encode(answer, add_special_tokens=False)) + ROUND_IT for answer in answers]
    return max(most, *needed)


def _longest(speech: Speech, content: Content) -> list[int]:
    """The questions with the most tokens."""
    sizes = [len(speech.encode(asked.text, add_special_tokens=False)) for asked in content.asked]
    return [number for number, size in enumerate(sizes) if size == max(sizes)][:2]


def _largest(tokens: Callable[[int], int], least: int, goal: int) -> int:
    """The size at which `tokens` last is within the goal, where it grows about evenly: a line through what is known is
    followed, and every third step halves what is left."""
    low, at_low, high, at_high = 0, least, 64, tokens(64)
    while at_high <= goal:
        if high >= 2 * goal:
            raise ValueError("a document does not grow with its size")
        slope = max((at_high - at_low) / (high - low), 1e-3)
        low, at_low = high, at_high
        high = min(2 * goal, high + max(1, int((goal - at_high) / slope * 1.02) + 2))
        at_high = tokens(high)
    turn = 0
    while high - low > 1:
        turn += 1
        guess = low + int((goal - at_low) * (high - low) / (at_high - at_low))
        middle = (low + high) // 2 if turn % 3 == 0 else min(max(guess, low + 1), high - 1)
        if (at := tokens(middle)) <= goal:
            low, at_low = middle, at
        else:
            high, at_high = middle, at
    return low


def questions(speech: Speech, content: Content, *, task: str, length: int, seed: int, most: int) -> list[Question]:
    """The requests that ask all of a content; with replies of at least `most` tokens."""
    made = []
    reply = reply_tokens(speech, content, most)
    for number, asked in enumerate(content.asked):
        text = content.user_text(number)
        chat: tuple[Message, ...] = ({"role": "user", "content": text},) if speech.has_chat_template else ()
        made.append(
            Question(
                task=task,
                length=length,
                document=f"{task}-{length}-{seed}",
                number=number,
                chat=chat,
                prompt="" if chat else plain_prompt(text),
                references=asked.references,
                tokens=count_tokens(speech, text),
                most=reply,
                any_counts=asked.any_counts,
                depth=asked.depth,
            )
        )
    return made
