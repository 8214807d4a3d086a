"""Synthetic retrieval tasks in real text: the questions of RULER, made to an exact length and scored as RULER does.

A prompt is a document (lines of filler with facts between them) and one or more questions about it, each with the
strings that a right answer contains. Everything is decided by `Task`, length, seed and split; the tokenizer enters only
as a function from text to token ids. `train` and `eval` share neither words of keys nor seeds.

    filler = Filler(text.splitlines(), encode)
    prompt = make_prompt(TASKS["multikey"], length=4096, seed=7, filler=filler)
    reply = chat(prompt.messages(0))
    share = score(reply, prompt.questions[0].references)
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal

Encode = Callable[[str], Sequence[int]]
Split = Literal["train", "eval"]
Message = dict[str, str]

ADJECTIVES = """
amber autumn basic bitter black blank blue bold brave bright broken clean clear cold common cool dark deep dense dim
distant double dry eager early easy empty even exact extra fair false fast final fine first flat formal fresh frozen
full gentle giant global golden good grand gray great green happy hard high hollow hot idle inner keen kind large late
local lone long loose loud low lucky magic main mean mild minor modern modest native neat new nice normal odd old open
orange outer pale patient pink plain polar poor present pretty prime private proper proud public pure purple quick
quiet rapid rare raw ready real recent red regular remote rough round sad safe shallow short shy silver simple single
slow small smart soft solar sour spare special stable static stern still strange strict strong subtle super tall tame
tart thick thin tight tired tough true typical upper useful valid vast warm weak weary wet white whole wide wild
winter wise worthy
""".split()  # noqa: SIM905
NOUNS = """
acorn actor agent animal apple arch army arrow author badge bag ball band bank barn base bath beach bean bear bell
bench block boat body bone book boot border box branch bread broom brush buffer button cable cake camp canal candle
car card cart castle cat cave cell chain chair chart city clay clock cloud clover coast coat coin column comet compass
copper coral corner cow crate cup custom dance desert dish doctor dog door dream dress earth east egg falcon farm
fence fern field fire fish flag flame flask flower flute fog fork frame gate ghost glass goat grass guest harbor hat
heart hill hive horn island jar key king kite lake lamp lantern leaf lemon letter library lily lion lock log machine
maple market mask meadow metal mill mint model monkey moon moss mouse nail needle nest net night oak office onion
otter oven owl page park path pear pen pier pin pine pipe plate plum pocket poem point pony port poster prince prism
quail rail rain raven reef ring river road robin rock roof room root rope rose sail sand sea seal seat seed shade
shark shell ship shop sink soap soil song south spice spider spring star station statue stone store storm story stove
stream sun table tea temple tent thread timber token toy track trail train tray tree trunk turtle unit vase vault vine
visitor wall watch wave west whale wheat wheel willow wind window wing world yard
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Form:
    """One way to state a fact and to ask for it; `{kind}`, `{key}` and `{value}` are filled in. Questions end with the
    key, so that a small model finds it where it starts to reply."""

    fact: str
    question: str


KINDS = ("special magic number", "pass key", "secret code", "access code", "serial number", "room number")
FORMS = (
    Form("One of the {kind}s for {key} is: {value}.", "In the text above, what is the {kind} for {key}?"),
    Form("The {kind} for {key} is {value}.", "What is the {kind} for {key}?"),
    Form("- {key}: {value}", "What is the {kind} for {key}?"),
)
QUOTED = Form('"{key}": "{value}",', 'What is the {kind} for "{key}"?')
PAIR_FORMS = (*FORMS, QUOTED)
SEVERAL_VALUES = "In the text above, what are all the {kind}s for {key}?"
SEVERAL_KEYS = "In the text above, what are the {kind}s for {keys}?"
CHAIN = "Find all variables in the text above that are assigned the value {value}."


@dataclass(frozen=True)
class Task:
    """What a document holds and what is asked about it."""

    name: str
    keys: int = 0  # keys with one value each; ignored where the haystack itself is facts
    repeated: int = 0  # keys with `values` values each
    values: int = 4
    together: int = 1  # keys asked for in one question
    chains: int = 0  # chains of variables
    hops: int = 4  # assignments in a chain after its first
    letters: bool = False  # variables named by five capitals, as in RULER, instead of by a word
    haystack: Literal["text", "facts"] = "text"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("single", keys=1),
        Task("multikey", keys=16),
        Task("multivalue", repeated=1),
        Task("multiquery", keys=8, together=4),
        Task("pairs", haystack="facts"),
        Task("variables", chains=1),
        Task("variables_letters", chains=1, letters=True),
    )
}


@dataclass(frozen=True)
class Question:
    """A question, the sentence that answers it, and the strings counted in a reply."""

    text: str
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A document of `lines` (each with its line end) and questions that may be asked of it, alone or in turn."""

    task: str
    length: int
    seed: int
    lines: tuple[str, ...]
    questions: tuple[Question, ...]
    fact_lines: frozenset[int] = field(default=frozenset(), repr=False)  # indices into `lines`

    @property
    def document(self) -> str:
        """The lines as one text."""
        return "".join(self.lines)

    def user_text(self, index: int) -> str:
        """The document followed by one question: the text of a single user turn."""
        return f"{self.document}\n{self.questions[index].text}"

    def messages(self, index: int) -> list[Message]:
        """A chat that asks question `index` alone."""
        return [{"role": "user", "content": self.user_text(index)}]

    def conversation(self) -> list[Message]:
        """All questions in turn with their answers; the document stands before the first."""
        turns: list[Message] = []
        for index, question in enumerate(self.questions):
            turns.append({"role": "user", "content": self.user_text(0) if index == 0 else question.text})
            turns.append({"role": "assistant", "content": question.answer})
        return turns


@dataclass(frozen=True)
class Words:
    """The words that keys are made of."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]

    @classmethod
    def of(cls, split: Split) -> "Words":
        """Every third word belongs to `eval`, the others to `train`."""

        def share(words: list[str]) -> tuple[str, ...]:
            return tuple(word for place, word in enumerate(words) if (place % 3 == 0) == (split == "eval"))

        return cls(share(ADJECTIVES), share(NOUNS))

    def keys(self, rng: random.Random, count: int) -> list[str]:
        """`count` different keys of two words, all with a blank or all with a hyphen between them."""
        most = len(self.adjectives) * len(self.nouns)
        if count > most:
            raise ValueError(f"{count} keys asked for, {most} can be made of these words")
        joint = rng.choice((" ", " ", "-"))
        drawn = rng.sample(range(most), count)
        return [
            f"{self.adjectives[n % len(self.adjectives)]}{joint}{self.nouns[n // len(self.adjectives)]}" for n in drawn
        ]


class Filler:
    """Lines of text to hide facts in, with the number of tokens of each. Lines that open with a blank or are empty
    are kept with the line before, so that the text can be cut between any two entries."""

    def __init__(self, lines: Sequence[str], encode: Encode) -> None:
        self.lines: list[str] = []
        for line in lines:
            if self.lines and (not line or line[0].isspace()) and len(self.lines[-1]) < 2000:
                self.lines[-1] += f"{line.rstrip()}\n"
            elif line.strip():
                self.lines.append(f"{line.strip()}\n")
        if not self.lines:
            raise ValueError("filler text is empty")
        self.encode = encode
        self.ends = list(accumulate(len(encode(line)) for line in self.lines))

    def take(self, rng: random.Random, tokens: int) -> list[str]:
        """Consecutive lines from a random place, `tokens` tokens long or a few less; wraps round at the end."""
        start = rng.randrange(len(self.lines))
        taken: list[str] = []
        while True:
            before = self.ends[start - 1] if start else 0
            stop = bisect_right(self.ends, before + tokens)
            taken += self.lines[start:stop]
            tokens -= (self.ends[stop - 1] if stop else 0) - before
            start = stop % len(self.lines)
            if stop < len(self.lines):
                break
        if piece := self.cut(self.lines[start], tokens):
            taken.append(piece)
        return taken

    def cut(self, line: str, tokens: int) -> str:
        """The first words of `line` that fit into `tokens` tokens, with a line end; empty where none does."""
        words = line.split(" ")
        low, high = 0, min(len(words), tokens)
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self.encode(" ".join(words[:middle]).rstrip() + "\n")) <= tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        text = " ".join(words[:low]).rstrip()
        return f"{text}\n" if text else ""


def score(reply: str, references: Sequence[str]) -> float:
    """The share of the reference strings found in the reply, without regard to case."""
    return sum(reference.lower() in reply.lower() for reference in references) / len(references)


def make_prompt(
    task: Task,
    length: int,
    seed: int,
    filler: Filler,
    *,
    split: Split = "eval",
    words: Words | None = None,
    questions: int = 1,
    reserve: int = 64,
) -> Prompt:
    """A prompt whose document and longest question make `length - reserve` tokens or a few less; what is reserved is
    for the chat template and the reply. As many of `questions` are asked as the document allows."""
    rng = random.Random(f"{split}/{task}/{length}/{seed}")
    words = words or Words.of(split)
    room = length - reserve
    if task.haystack == "facts":
        facts, asked = _pairs(rng, words, filler.encode, room - 40, questions)
        lines, fact_lines = [f"{fact}\n" for fact in facts], frozenset(range(len(facts)))
    else:
        groups, asked = _facts(task, rng, words)
        rng.shuffle(asked)
        asked = asked[:questions]
        spent = sum(len(filler.encode(f"{fact}\n")) for group in groups for fact in group)
        spent += max(len(filler.encode(f"\n{question.text}")) for question in asked)
        if spent > room:
            raise ValueError(f"task {task.name} needs {spent} tokens for its facts and question; {room} are left")
        lines, fact_lines = _scatter(rng, groups, filler.take(rng, room - spent))
    return Prompt(task.name, length, seed, tuple(lines), tuple(asked), fact_lines)


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _pairs(
    rng: random.Random, words: Words, encode: Encode, room: int, questions: int
) -> tuple[list[str], list[Question]]:
    """Facts of one form until `room` tokens are full, and questions about some of them."""
    form, kind, digits = rng.choice(PAIR_FORMS), rng.choice(KINDS), rng.choice((5, 6, 7))
    most = len(words.adjectives) * len(words.nouns)
    facts: list[str] = []
    asked: list[Question] = []
    for key in words.keys(rng, max(0, min(most, room // 8))):
        value = _number(rng, digits)
        fact = form.fact.format(kind=kind, key=key, value=value)
        room -= len(encode(f"{fact}\n"))
        if room < 0:
            break
        facts.append(fact)
        asked.append(_ask_keys(form, kind, [(key, value)]))
    if not facts:
        raise ValueError("no key-value pair fits into this length")
    return facts, rng.sample(asked, min(questions, len(asked)))


def _facts(task: Task, rng: random.Random, words: Words) -> tuple[list[list[str]], list[Question]]:
    """Groups of facts (the order within a group is kept in the document) and every question about them."""
    groups: list[list[str]] = []
    asked: list[Question] = []
    keys = words.keys(rng, task.keys + task.repeated)
    form, kind = rng.choice(FORMS), rng.choice(KINDS)
    singles = [(key, _number(rng, rng.choice((5, 6, 7)))) for key in keys[: task.keys]]
    groups += [[form.fact.format(kind=kind, key=key, value=value)] for key, value in singles]
    for at in range(0, len(singles) - task.together + 1, task.together):
        asked.append(_ask_keys(form, kind, singles[at : at + task.together]))
    for key in keys[task.keys :]:
        group = [_number(rng, rng.choice((5, 6, 7))) for _ in range(task.values)]
        groups.append([form.fact.format(kind=kind, key=key, value=value) for value in group])
        text = SEVERAL_VALUES.format(kind=kind, key=key)
        # in any order, so that none is learned that the document does not show where it is asked
        asked.append(Question(text, ", ".join(rng.sample(group, len(group))), tuple(group)))
    names = _names(rng, words, task.chains * (task.hops + 1), task.letters)
    for chain in range(task.chains):
        facts, question = _chain(rng, names[chain * (task.hops + 1) : (chain + 1) * (task.hops + 1)])
        groups.append(facts)
        asked.append(question)
    return groups, asked


def _ask_keys(form: Form, kind: str, pairs: Sequence[tuple[str, str]]) -> Question:
    """One question for the values of one or several keys."""
    if len(pairs) == 1:
        ((key, value),) = pairs
        return Question(form.question.format(kind=kind, key=key), value, (value,))
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(pairs)]
    asked = [f"({letter}) {key}" for letter, (key, _) in zip(letters, pairs, strict=True)]
    answer = ", ".join(f"({letter}) {key}: {value}" for letter, (key, value) in zip(letters, pairs, strict=True))
    text = SEVERAL_KEYS.format(kind=kind, keys=_joined(asked))
    return Question(text, answer, tuple(value for _, value in pairs))


def _names(rng: random.Random, words: Words, count: int, letters: bool) -> list[str]:
    """Different names of variables."""
    if not letters:
        return rng.sample(words.nouns, count)
    names: set[str] = set()
    while len(names) < count:
        names.add("".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)))
    return rng.sample(sorted(names), count)


def _chain(rng: random.Random, names: Sequence[str]) -> tuple[list[str], Question]:
    """Assignments that hand one value from name to name, and the question for all names that hold it."""
    value = _number(rng, 5)
    facts = [f"VAR {names[0]} = {value}"]
    facts += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    return facts, Question(CHAIN.format(value=value), ", ".join(names), tuple(names))


def _scatter(rng: random.Random, groups: list[list[str]], filler: list[str]) -> tuple[list[str], frozenset[int]]:
    """Filler with the facts between its lines at random places, each group in its order; where the facts stand."""
    order = [index for index, group in enumerate(groups) for _ in group]
    rng.shuffle(order)
    waiting = [iter(group) for group in groups]
    cuts = sorted(rng.randint(0, len(filler)) for _ in order)
    lines: list[str] = []
    places: list[int] = []
    done = 0
    for cut, index in zip(cuts, order, strict=True):
        lines += filler[done:cut]
        places.append(len(lines))
        lines.append(f"{next(waiting[index])}\n")
        done = cut
    return lines + filler[done:], frozenset(places)
