"""RULER's QA over the user's own text: a file of JSON lines with `context`, `question` and `answers`.

A `context` that is a text asks qa_1, one document with the answer among others; a list of texts asks qa_2, several that
are needed together. The other documents are contexts of other lines, then stretches of the haystack's text."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from gossamer.server.eval.fitting import Asked, Build, Content
from gossamer.server.eval.haystacks import Material, generator
from gossamer.server.eval.question import EvalError

STRETCH = 150  # tokens of a document that is made of the haystack's text
REQUEST = "Answer the question from the documents above with the answer alone. Question: "


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the file."""

    context: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QAText:
    """The lines of a file, by task."""

    entries: dict[str, tuple[Entry, ...]]

    @classmethod
    def read(cls, path: Path) -> "QAText":
        """Raises EvalError with one sentence."""
        found: dict[str, list[Entry]] = {"qa_1": [], "qa_2": []}
        for number, line in json_lines(path, "--qa"):
            context, question, answers = (line.get(name) for name in ("context", "question", "answers"))
            contexts, right = _texts([context] if isinstance(context, str) else context), _texts(answers)
            if not (contexts and right and isinstance(question, str) and question):
                raise EvalError(
                    f'--qa {path} is wrong in line {number}: write {{"context": "…", "question": "…", "answers": '
                    '["…"]}, where context may be a list of texts.'
                )
            entry = Entry(contexts, question, right)
            found["qa_1" if len(entry.context) == 1 else "qa_2"].append(entry)
        return cls({task: tuple(own) for task, own in found.items() if own})

    def task(self, name: str, length: int, seed: int, material: Material) -> Build:
        """One question of the task; the seed chooses which."""
        entries = self.entries[name]
        entry = entries[seed % len(entries)]
        others = [text for own in self.entries.values() for each in own if each is not entry for text in each.context]
        return partial(_build, partial(generator, name, length, seed), entry, others, material)


def _build(draw: Callable[[str], Random], entry: Entry, others: list[str], material: Material, size: int) -> Content:
    known = set(entry.context)
    others = sorted({text for text in others if text not in known})
    draw("others").shuffle(others)
    stretches = draw("haystack")
    documents = [*entry.context, *others[:size]]
    while len(documents) < len(entry.context) + size:
        documents.append("".join(material.filler.take(stretches, STRETCH)).strip())
    draw("order").shuffle(documents)
    text = "".join(f"Document {number}:\n{document}\n\n" for number, document in enumerate(documents, 1))
    return Content(text, (Asked(REQUEST + entry.question, entry.answers, any_counts=True),))


def json_lines(path: Path, flag: str) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a file of JSON lines, with their line numbers. Raises EvalError; a file without any is refused."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise EvalError(f"{flag} {path} cannot be read ({reason}); give a file of JSON lines.") from error
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise EvalError(f"{flag} {path} is wrong in line {number}: every line must be a JSON object.")
        count += 1
        yield number, value
    if not count:
        raise EvalError(f"{flag} {path} is empty; give a file of JSON lines.")


def _texts(value: object) -> tuple[str, ...]:
    """A list of texts; empty where it is anything else, or holds an empty one."""
    texts = value if isinstance(value, list) else []
    return tuple(texts) if all(isinstance(each, str) and each for each in texts) else ()
