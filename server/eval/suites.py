"""The suites: what each asks at each length. Documents come from seeds and text that search never used."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gossamer.attention.profiling.tasks import FORMS
from gossamer.server.eval.fitting import Asked, Content, Speech, fit, questions
from gossamer.server.eval.haystacks import Material, generator, hide, make_number, word_keys
from gossamer.server.eval.own import own_questions
from gossamer.server.eval.qa import QAText
from gossamer.server.eval.question import FIRST_SEED, EvalError, Passage, Question
from gossamer.server.eval.ruler import MOST, QA, ruler_task

SUITES = ("ruler", "needle", "perplexity")
NEEDLE, NEEDLE_MOST = "needle", 64
KIND = "special magic number"
PERPLEXITY = "perplexity"
SCORED = 1024  # last tokens of a text, at most a quarter of it


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked. seed: added to FIRST_SEED. depths: of needles, 0 to 1. most: tokens of a reply to a prompt of the
    user's own file."""

    suites: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    documents: int
    questions: int
    seed: int
    depths: tuple[float, ...]
    most: int
    qa: QAText | None

    @property
    def seeds(self) -> range:
        return range(FIRST_SEED + self.seed, FIRST_SEED + self.seed + self.documents)

    @property
    def ruler_tasks(self) -> tuple[str, ...]:
        """Those that can be made: QA needs text for it."""
        known = self.qa.entries if self.qa else {}
        return tuple(task for task in self.tasks if task not in QA or task in known)

    @property
    def left_out(self) -> tuple[str, ...]:
        """RULER's tasks that were asked for and cannot be made."""
        return tuple(task for task in self.tasks if task not in self.ruler_tasks) if "ruler" in self.suites else ()


def make_work(plan: Plan, speech: Speech, material: Material) -> Iterator[list[Question] | Passage]:
    """The questions of one document after another, or a text to read. Raises EvalError."""
    for suite in plan.suites:
        if suite == "ruler":
            yield from _ruler(plan, speech, material)
        elif suite == "needle":
            yield from _needles(plan, speech, material)
        elif suite == "perplexity":
            yield from _passages(plan, speech, material)
        else:
            yield from ([question] for question in own_questions(Path(suite), speech, plan.most))


def _ruler(plan: Plan, speech: Speech, material: Material) -> Iterator[list[Question]]:
    for length in plan.lengths:
        for task in plan.ruler_tasks:
            for seed in plan.seeds:
                if task in QA:
                    assert plan.qa is not None
                    build = plan.qa.task(task, length, seed, material)
                else:
                    build = ruler_task(task, length, seed, material, plan.questions)
                content = fit(speech, build, task=task, length=length, most=MOST[task])
                yield questions(speech, content, task=task, length=length, seed=seed, most=MOST[task])


def _needles(plan: Plan, speech: Speech, material: Material) -> Iterator[list[Question]]:
    """One document for each length, depth and seed."""
    for length in plan.lengths:
        for depth in plan.depths:
            for seed in plan.seeds:
                name = f"{NEEDLE}-{depth:.3f}"
                build = partial(_needle, name, length, seed, depth, material)
                content = fit(speech, build, task=NEEDLE, length=length, most=NEEDLE_MOST)
                asked = questions(speech, content, task=name, length=length, seed=seed, most=NEEDLE_MOST)
                yield [replace(question, task=NEEDLE) for question in asked]


def _needle(name: str, length: int, seed: int, depth: float, material: Material, size: int) -> Content:
    rng = generator(name, length, seed, "facts")
    key, value = next(word_keys(material.words, rng)), make_number(rng)
    lines = material.filler.take(generator(name, length, seed, "haystack"), size)
    fact = FORMS[0].fact.format(kind=KIND, key=key, value=value)
    asked = Asked(FORMS[0].question.format(kind=KIND, key=key), (value,), depth=depth)
    return Content(hide(lines, [fact], [depth]), (asked,))


def _passages(plan: Plan, speech: Speech, material: Material) -> Iterator[Passage]:
    """One token of the length is left for servers that have to generate one."""
    for length in plan.lengths:
        for seed in plan.seeds:
            name = f"{PERPLEXITY}-{length}-{seed}"
            tokens = _text(material, random.Random(f"eval/{name}"), length, speech)[: length - 1]
            if len(tokens) < length - 1:
                raise EvalError(
                    f"The text gives {len(tokens)} tokens where {length} were asked for; give a longer --data file."
                )
            yield Passage(PERPLEXITY, length, name, tuple(tokens), min(SCORED, length // 4))


def _text(material: Material, rng: random.Random, length: int, speech: Speech) -> Sequence[int]:
    """Consecutive lines; tokens of joined lines may be fewer than those of lines apart."""
    return speech.encode("".join(material.filler.take(rng, length + length // 8)))
