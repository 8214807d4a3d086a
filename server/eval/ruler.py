"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv:2404.06654), made anew from the published construction.

The wording is ours, and so are the noise lines, the words of keys and lists, and the text that stands for essays; the
kinds of needles, their number, the haystacks, the counts of words, the lengths of replies and the scoring are RULER's.
Prompts are chats of one turn; RULER's forced beginning of the answer is left out, since not every server can go on from
one.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Literal

from gossamer.attention.profiling.tasks import CHAIN, FORMS, SEVERAL_KEYS, SEVERAL_VALUES
from gossamer.server.eval.fitting import Asked, Build, Content
from gossamer.server.eval.haystacks import (
    NOISE,
    Material,
    depths,
    generator,
    hide,
    make_number,
    make_uuid,
    uuid_keys,
    word_keys,
)

NEEDLE = FORMS[0]
HOPS = 4
COMMON = 10  # words to name in cwe
CODED = 3  # and in fwe
ZETA_2 = 1.6449340668482264  # the sum of 1 / k²
SHORT = 4096  # tokens below which cwe repeats its words less


@dataclass(frozen=True, slots=True)
class Niah:
    """A task of needles: `keys` with `values` each; `together` keys are asked for in one question."""

    haystack: Literal["noise", "text", "facts"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    together: int = 1


NIAH: dict[str, Niah] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("text"),
    "niah_single_3": Niah("text", value="uuid"),
    "niah_multikey_1": Niah("text", keys=4),
    "niah_multikey_2": Niah("facts"),
    "niah_multikey_3": Niah("facts", key="uuid", value="uuid"),
    "niah_multivalue": Niah("text", values=4),
    "niah_multiquery": Niah("text", keys=4, together=4),
}
MOST: dict[str, int] = {  # tokens of a reply
    **dict.fromkeys(NIAH, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
QA = ("qa_1", "qa_2")
TASKS = tuple(MOST)


def ruler_task(name: str, length: int, seed: int, material: Material, questions: int) -> Build:
    """A document of any of the tasks but QA, from its size; as many of `questions` as its construction has to ask."""
    draw = partial(generator, name, length, seed)
    if name in NIAH:
        return partial(_niah, NIAH[name], draw, material, questions)
    builds: dict[str, Build] = {
        "vt": partial(_variables, draw),
        "cwe": partial(_often_words, draw, material.list_words, length),
        "fwe": partial(_frequent_words, draw, length),
    }
    return builds[name]


Draw = Callable[[str], random.Random]


def _niah(task: Niah, draw: Draw, material: Material, questions: int, size: int) -> Content:
    rng = draw("facts")
    kind = f"special magic {task.value}"
    keys = uuid_keys(rng) if task.key == "uuid" else word_keys(material.words, rng)
    make = make_uuid if task.value == "uuid" else make_number
    if task.haystack == "facts":
        pairs = [(key, make(rng)) for key in islice(keys, size + 1)]
        asked = [_ask(kind, [pair]) for pair in draw("asked").sample(pairs, min(questions, len(pairs)))]
        lines = (NEEDLE.fact.format(kind=kind, key=key, value=value) for key, value in pairs)
        return Content("".join(f"{line}\n" for line in lines), tuple(asked))
    own = [(key, [make(rng) for _ in range(task.values)]) for key in islice(keys, task.keys)]
    facts = [NEEDLE.fact.format(kind=kind, key=key, value=value) for key, values in own for value in values]
    rng.shuffle(facts)
    hay = [NOISE] * size if task.haystack == "noise" else material.filler.take(draw("haystack"), size)
    document = hide(hay, facts, depths(rng, len(facts)))
    if task.values > 1:
        ((key, values),) = own
        return Content(document, (Asked(SEVERAL_VALUES.format(kind=kind, key=key), tuple(values)),))
    singles = [(key, values[0]) for key, values in own]
    if task.together > 1:
        return Content(document, (_ask(kind, singles),))
    return Content(document, tuple(_ask(kind, [pair]) for pair in singles[:questions]))


def _ask(kind: str, pairs: Sequence[tuple[str, str]]) -> Asked:
    values = tuple(value for _, value in pairs)
    if len(pairs) == 1:
        return Asked(NEEDLE.question.format(kind=kind, key=pairs[0][0]), values)
    named = [f"({letter}) {key}" for letter, (key, _) in zip("abcdefghij", pairs, strict=False)]
    return Asked(SEVERAL_KEYS.format(kind=kind, keys=f"{', '.join(named[:-1])} and {named[-1]}"), values)


def _variables(draw: Draw, size: int) -> Content:
    """One chain of assignments in noise, behind a short example of another one."""
    example, answer = _chain(draw("example"), 12)
    content, _ = _chain(draw("facts"), size)
    (asked,) = content.asked
    return Content(f"{example.user_text(0)}\n{answer}\n\n{content.document}", (asked,))


def _chain(rng: random.Random, noise: int) -> tuple[Content, str]:
    """With so many lines of noise; and its answer."""
    names: list[str] = list(islice(_different(rng, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5), HOPS + 1))
    value = make_number(rng, 5)
    facts = [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {before}" for before, name in pairwise(names))]
    document = hide([NOISE] * noise, facts, depths(rng, len(facts)))
    return Content(document, (Asked(CHAIN.format(value=value), tuple(names)),)), ", ".join(names)


def _different(rng: random.Random, letters: str, count: int) -> Iterator[str]:
    """Different words of so many letters."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choices(letters, k=count))
        if word not in seen:
            seen.add(word)
            yield word


def _often_words(draw: Draw, words: Sequence[str], length: int, size: int) -> Content:
    """A numbered list: ten words that come often, `size` others that come seldom; behind a short example."""
    often, seldom = (30, 3) if length >= SHORT else (6, 1)
    others, repeated, once = (30, 10, 3) if length >= SHORT else (10, 3, 1)  # of the example
    pool = _list_words(words, draw("words"))
    example = list(islice(pool, COMMON + others))
    chosen = list(islice(pool, COMMON + size))
    shown = _numbered(example, repeated, once, draw("example"))
    answer = _numbered_line(example[:COMMON])
    document = _numbered(chosen, often, seldom, draw("order"))
    question = f"What are the {COMMON} words that come most often in the numbered list above?"
    text = f"{shown}\n{question}\n{answer}\n\n{document}"
    return Content(text, (Asked(question, tuple(chosen[:COMMON])),))


def _list_words(words: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Different words: each once, then two joined."""
    yield from rng.sample(words, len(words))
    seen: set[str] = set(words)
    while True:
        word = rng.choice(words) + rng.choice(words)
        if word not in seen:
            seen.add(word)
            yield word


def _numbered(words: Sequence[str], often: int, seldom: int, rng: random.Random) -> str:
    """The first ten so often, the others so seldom, in any order."""
    entries = [*list(words[:COMMON]) * often, *list(words[COMMON:]) * seldom]
    rng.shuffle(entries)
    return _numbered_line(entries) + "\n"


def _numbered_line(entries: Iterable[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))


def _frequent_words(draw: Draw, length: int, size: int) -> Content:
    """Words without meaning, the k-th most frequent of them N / (ζ(2) k²) times; the first is dots."""
    total = size + 60  # from there on the first five differ in number
    vocabulary = islice(_different(draw("words"), "abcdefghijklmnopqrstuvwxyz", 6), max(length // 50, 8))
    words = ["...", *vocabulary]
    counts = [int(total / (ZETA_2 * rank * rank)) for rank in range(1, len(words) + 1)]
    entries = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    draw("order").shuffle(entries)
    question = (
        f"The coded text above holds words without a meaning. Which {CODED} of them come most often? Do not count the "
        "dots."
    )
    return Content(" ".join(entries) + "\n", (Asked(question, tuple(words[1 : 1 + CODED])),))
