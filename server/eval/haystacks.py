"""What facts are hidden in, and what they are made of. Everything is decided by the random generator that is given."""

import random
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gossamer.attention.profiling.tasks import Filler, Words

NOISE = "The hills are quiet. The lake is cold. The clouds are low. We walk on. Soon we turn and walk home.\n"
DEPTHS = 40  # places of a needle, evenly from the first line to the last
SPLIT = "eval"


@dataclass(frozen=True, slots=True)
class Material:
    """What all tasks draw from: text of the `eval` split, and the words of keys, which search never saw. `list_words`:
    different words of the text, for lists of words."""

    filler: Filler
    words: Words
    list_words: tuple[str, ...]

    @classmethod
    def of(cls, filler: Filler) -> "Material":
        found = {word for line in filler.lines for word in re.findall(r"\b[a-z]{5,9}\b", line)}
        words = Words.of("eval")
        own = {word for word in (*words.adjectives, *words.nouns) if len(word) > 4}  # few stand in other words
        return cls(filler, words, tuple(sorted(found | own)))


def generator(task: str, length: int, seed: int, part: str) -> random.Random:
    """A generator of its own for each part of a document, so that one part does not change with the size of another."""
    return random.Random(f"{SPLIT}/{task}/{length}/{seed}/{part}")


def word_keys(words: Words, rng: random.Random) -> Iterator[str]:
    """Different keys: an adjective and a noun, with more adjectives where these are used up."""
    seen: set[str] = set()
    adjectives = 1
    while True:
        if len(seen) > 0.7 * len(words.adjectives) ** adjectives * len(words.nouns):
            adjectives += 1
        key = "-".join([*rng.choices(words.adjectives, k=adjectives), rng.choice(words.nouns)])
        if key not in seen:
            seen.add(key)
            yield key


def uuid_keys(rng: random.Random) -> Iterator[str]:
    while True:
        yield make_uuid(rng)


def make_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def make_number(rng: random.Random, digits: int = 7) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def depths(rng: random.Random, count: int) -> list[float]:
    """So many places, 0 to 1, ascending; different ones as far as there are any."""
    places = rng.sample(range(DEPTHS), count) if count <= DEPTHS else rng.choices(range(DEPTHS), k=count)
    return sorted(place / (DEPTHS - 1) for place in places)


def hide(lines: Sequence[str], facts: Sequence[str], places: Sequence[float]) -> str:
    """The lines with fact i behind the share `places[i]` of them (ascending)."""
    parts: list[str] = []
    done = 0
    for fact, place in zip(facts, places, strict=True):
        cut = round(place * len(lines))
        parts += lines[done:cut]
        parts.append(f"{fact}\n")
        done = cut
    return "".join([*parts, *lines[done:]])
