"""Makes the questions, has them answered at every point, and counts."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gossamer.attention.packaged import packaged_for
from gossamer.attention.policy_file import PolicyError, check_model
from gossamer.attention.policy_view import load_policy
from gossamer.attention.profiling.tasks import Filler
from gossamer.server.config import ServerConfig
from gossamer.server.engine.declared import declared_shape
from gossamer.server.engine.families import StartupError
from gossamer.server.engine.model import load_config
from gossamer.server.engine.tokenizer import Tokenizer
from gossamer.server.eval.answering import Answering
from gossamer.server.eval.haystacks import Material
from gossamer.server.eval.local import Local, Wanted
from gossamer.server.eval.question import EvalError, Passage, Question
from gossamer.server.eval.remote import Remote
from gossamer.server.eval.results import Cell, Outcome, Predicted, cells
from gossamer.server.eval.suites import SUITES, Plan, make_work
from gossamer.server.profile.run import held_out_text, weights_digest

SEQUENCES = 8  # that the engine here runs at once


class Progress(Protocol):
    def say(self, text: str) -> None: ...
    def begin(self, stage: str, total: int) -> None: ...
    def tick(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What the command was asked for. policies: "NAME" or "NAME:POINT"; against a `url`, operating points of that
    server. data: a text file in place of Python's library."""

    config: ServerConfig
    plan: Plan
    policies: tuple[str, ...]
    url: str | None
    key: str | None
    data: Path | None


@dataclass
class Found:
    """What was answered; `cells` counts it. notes: sentences for whoever reads the numbers."""

    points: tuple[str, ...]
    baseline: str | None
    data: str
    fingerprints: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    texts: list[Predicted] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[Cell]:
        return cells(self.outcomes, self.texts, self.baseline)


def evaluate(job: Job, progress: Progress) -> Found:
    """Raises StartupError or EvalError with one sentence. An interrupt ends it with what there is, and a note."""
    config, plan = job.config, job.plan
    remote = None if job.url is None else Remote(job.url, config.model, job.key, job.policies)
    wanted = _policies(config, job.policies) if remote is None else []
    speech = _tokenizer(config)
    needs_text = bool(set(plan.suites) & set(SUITES))  # a file's prompts have their own
    held, data = held_out_text(job.data) if needs_text else ({"eval": ["none"]}, "the user's own")
    progress.say("Making the documents")
    material = Material.of(Filler(held["eval"], lambda text: speech.encode(text, add_special_tokens=False)))
    work = list(make_work(plan, speech, material))
    if not work:
        raise EvalError("None of the tasks asked for can be made; RULER's QA needs your text: --qa FILE.")
    longest = _longest(work)
    if remote is not None:
        remote.check_length(longest)
        return _found(plan, remote, data, work, progress)
    served = dataclasses.replace(config, max_model_len=longest, max_num_seqs=SEQUENCES)
    local = Local(served, wanted, longest, progress.say)
    try:
        found = _found(plan, local, data, work, progress)
    finally:
        local.stop()
    if local.dense_too:
        found.notes.append(f"Dense, and so not asked again: {', '.join(local.dense_too)}.")
    return found


def _found(
    plan: Plan, answering: Answering, data: str, work: Sequence[list[Question] | Passage], progress: Progress
) -> Found:
    found = Found(answering.points, answering.baseline, data)
    if plan.left_out:
        found.notes.append(f"Left out, for want of --qa FILE with text for it: {', '.join(plan.left_out)}.")
    if answering.baseline is None:
        found.notes.append("The server offers no dense operating point to compare with.")
    _ask_all(answering, work, found, progress)
    found.fingerprints = answering.fingerprints()
    return found


def _ask_all(answering: Answering, work: Sequence[list[Question] | Passage], found: Found, progress: Progress) -> None:
    progress.begin("Asking", len(work) * len(answering.points))
    try:
        for each in work:
            outcomes: list[Outcome] = []
            texts: list[Predicted] = []
            for point in answering.points:
                if isinstance(each, Passage):
                    texts.append(Predicted(point, each, answering.read(point, each)))
                else:
                    answers = answering.ask(point, each)
                    outcomes += [Outcome(point, q, answer) for q, answer in zip(each, answers, strict=True)]
                progress.tick()
            found.outcomes += outcomes  # whole documents, so that all points have answered the same
            found.texts += texts
    except KeyboardInterrupt:
        if not found.outcomes and not found.texts:
            raise
        found.notes.append("Stopped before the end: these are the documents that all points had answered.")


def _longest(work: Sequence[list[Question] | Passage]) -> int:
    """Tokens of the longest prompt with its reply."""
    return max(
        len(each.tokens) + 1 if isinstance(each, Passage) else max(q.tokens + q.most for q in each) for each in work
    )


def _policies(config: ServerConfig, asked: Sequence[str]) -> list[Wanted]:
    """Read and checked against the model's config.json. Without any, the model's own, as the server would choose it."""
    own = packaged_for(config.model_path)
    try:
        wanted = [_wanted(each) for each in asked or ([str(own)] if own else []) if each != "dense"]
        shape = dataclasses.asdict(declared_shape(load_config(config.model_path, config.revision)))
        for each in wanted:
            check_model(each.loaded.file, **shape)
    except PolicyError as error:
        raise EvalError(str(error)) from error
    return wanted


def _wanted(asked: str) -> Wanted:
    """ "policy.yaml:fast" -> the file, and its point."""
    name, colon, point = asked.rpartition(":")
    if not colon or Path(asked).is_file():
        return Wanted(load_policy(asked), None)
    loaded = load_policy(name)
    if point not in loaded.policy.names:
        raise EvalError(
            f"The policy {loaded.file.name!r} has no operating point {point!r}; it has: "
            f"{', '.join(loaded.policy.names)}."
        )
    return Wanted(loaded, point)


def _tokenizer(config: ServerConfig) -> Tokenizer:
    try:
        return Tokenizer.load(
            config.tokenizer or config.model_path, revision=config.revision, chat_template=config.chat_template
        )
    except ValueError as error:
        raise StartupError(str(error)) from error


def report(found: Found, job: Job, about: dict[str, Any]) -> dict[str, Any]:
    """For the JSON file. `about`: command, commit and versions."""
    plan = job.plan
    return {
        **about,
        "model": job.config.model,
        "url": job.url,
        "weights": None if job.url else weights_digest(job.config.model_path),
        "text": found.data,
        "plan": {
            "suites": list(plan.suites),
            "tasks": list(plan.ruler_tasks) if "ruler" in plan.suites else [],
            "lengths": list(plan.lengths),
            "documents": plan.documents,
            "questions": plan.questions,
            "seeds": [plan.seeds.start, plan.seeds.stop],
            "split": "eval",
        },
        "points": list(found.points),
        "baseline": found.baseline,
        "fingerprints": found.fingerprints,
        "notes": found.notes,
        "cells": [_cell(cell) for cell in found.cells()],
        "needle": needle_grid(found.outcomes),
        "answers": [_outcome(outcome) for outcome in found.outcomes],
        "texts": [
            {
                "point": text.point,
                "document": text.passage.document,
                "length": text.passage.length,
                "tokens": len(text.likelihood.logprobs),
                "log_likelihood": sum(text.likelihood.logprobs),
                "use": dataclasses.asdict(text.likelihood.use),
            }
            for text in found.texts
        ],
    }


def needle_grid(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Mean score by point, length and depth."""
    grid: dict[tuple[str, int, float], list[float]] = {}
    for outcome in outcomes:
        question = outcome.question
        if question.depth is not None:
            grid.setdefault((outcome.point, question.length, question.depth), []).append(outcome.score)
    return [
        {"point": point, "length": length, "depth": depth, "questions": len(own), "accuracy": sum(own) / len(own)}
        for (point, length, depth), own in grid.items()
    ]


def _cell(cell: Cell) -> dict[str, Any]:
    """Scores with the strings found; texts with their perplexity."""
    shared = {
        "task": cell.task,
        "length": cell.length,
        "point": cell.point,
        "difference_to_dense": cell.difference,
        "difference_interval_95": cell.difference_interval,
        "prefill_density": cell.densities.prefill,
        "decode_density": cell.densities.decode,
    }
    if cell.text:
        own = {"runs": cell.units, "nats_per_token": cell.value, "interval_95": cell.interval}
        return shared | own | {"perplexity": cell.perplexity}
    return shared | {
        "questions": cell.units,
        "whole": cell.whole,
        "references": cell.references,
        "found": cell.found,
        "accuracy": cell.value,
        "wilson_95": cell.interval,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    question, answer = outcome.question, outcome.answer
    return {
        "point": outcome.point,
        "task": question.task,
        "length": question.length,
        "document": question.document,
        "number": question.number,
        "depth": question.depth,
        "references": list(question.references),
        "found": outcome.found,
        "score": outcome.score,
        "reply": answer.text,
        "use": dataclasses.asdict(answer.use),
    }
