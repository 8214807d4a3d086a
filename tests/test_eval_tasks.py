"""RULER's thirteen tasks, needles, texts and the user's own prompts: exact lengths, right answers, unseen by search."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.attention.profiling.tasks import Filler, Words
from gossamer.server.config import ServerConfig
from gossamer.server.engine.tokenizer import Tokenizer
from gossamer.server.eval.fitting import Content, fit
from gossamer.server.eval.haystacks import Material
from gossamer.server.eval.own import own_questions
from gossamer.server.eval.qa import QAText
from gossamer.server.eval.question import FIRST_SEED, EvalError, Passage, Question, score
from gossamer.server.eval.ruler import MOST, TASKS, ruler_task
from gossamer.server.eval.suites import Plan, make_work

LENGTH = 1536
LINES = [
    f"Line {n} speaks of harvest, weather and the {word} at noon." for n, word in enumerate(["miller", "smith"] * 60)
]


@pytest.fixture(scope="module")
def speech() -> Tokenizer:
    return Tokenizer.load(ServerConfig().model_path)


@pytest.fixture(scope="module")
def material(speech: Tokenizer) -> Material:
    return Material.of(Filler(LINES, lambda text: speech.encode(text, add_special_tokens=False)))


@pytest.fixture(scope="module")
def qa(tmp_path_factory: pytest.TempPathFactory) -> QAText:
    file = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    rows = [
        {
            "context": "The mill burnt in 1820.",
            "question": "When did the mill burn?",
            "answers": ["1820", "the twenties"],
        },
        {
            "context": ["Ann lives in Ulm.", "Ulm has a spire."],
            "question": "What has Ann's town?",
            "answers": ["a spire"],
        },
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return QAText.read(file)


def plan(qa: QAText | None = None, **changed: object) -> Plan:
    given: dict[str, object] = {
        "suites": ("ruler",),
        "tasks": TASKS,
        "lengths": (LENGTH,),
        "documents": 1,
        "questions": 3,
        "seed": 0,
        "depths": (0.0, 0.5, 1.0),
        "most": 16,
        "qa": qa,
    }
    return Plan(**(given | changed))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def asked(speech: Tokenizer, material: Material, qa: QAText) -> dict[str, list[Question]]:
    """The questions of each of the thirteen tasks."""
    made = [each for each in make_work(plan(qa), speech, material) if not isinstance(each, Passage)]
    return {each[0].task: each for each in made}


def text_of(question: Question) -> str:
    (turn,) = question.chat
    return turn["content"]


def test_there_are_thirteen_and_each_fills_its_length(asked: dict[str, list[Question]], speech: Tokenizer) -> None:
    assert tuple(asked) == TASKS and len(TASKS) == 13
    for task, questions in asked.items():
        for question in questions:
            tokens = len(speech.encode_chat(question.chat))
            assert tokens == question.tokens
            unit = (
                180 if task.startswith("qa") else 90 if task == "niah_multikey_3" else 40
            )  # a document, a needle, a line
            assert question.most >= MOST[task]
            assert LENGTH - unit <= tokens + question.most <= LENGTH, task


@pytest.mark.parametrize(
    ("task", "count", "references", "shape"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 3, 1, r"\d{7}"),
        ("niah_multikey_2", 3, 1, r"\d{7}"),
        ("niah_multikey_3", 3, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multivalue", 1, 4, r"\d{7}"),
        ("niah_multiquery", 1, 4, r"\d{7}"),
    ],
)
def test_needles_are_in_the_document_once(
    asked: dict[str, list[Question]], task: str, count: int, references: int, shape: str
) -> None:
    questions = asked[task]
    assert len(questions) == count and len({question.references for question in questions}) == count
    for question in questions:
        assert len(question.references) == references
        for value in question.references:
            assert re.fullmatch(shape, value)
            (line,) = [line for line in text_of(question).splitlines() if value in line]
            key = re.fullmatch(r"One of the special magic \w+ for (.+) is: (.+)\.", line)
            assert key is not None and key[2] == value and key[1] in text_of(question).splitlines()[-1]
    needles = text_of(questions[0]).count("One of the special magic")
    distractors = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    assert needles == distractors.get(task, 1) or (task in ("niah_multikey_2", "niah_multikey_3") and needles > 10)


def test_a_chain_of_variables_hands_on_one_value(asked: dict[str, list[Question]]) -> None:
    (question,) = asked["vt"]
    document = text_of(question).rpartition("\n\n")[0].rpartition("\n\n")[2]
    facts = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", document, re.MULTILINE)
    names = [name for name, _ in facts]
    assert tuple(names) == question.references and len(set(names)) == 5
    assert [value for _, value in facts[1:]] == names[:-1]
    assert facts[0][1] in text_of(question).splitlines()[-1]


def test_the_common_words_are_the_most_common(asked: dict[str, list[Question]]) -> None:
    (question,) = asked["cwe"]
    listed = text_of(question).rpartition("\n\n")[0].rpartition("\n\n")[2]
    counts = Counter(re.findall(r"\d+\. (\w+)", listed)).most_common()
    assert {word for word, _ in counts[:10]} == set(question.references)
    assert {count for _, count in counts[:10]} == {6} and {count for _, count in counts[10:]} == {1}


def test_the_frequent_words_follow_zeta(asked: dict[str, list[Question]]) -> None:
    (question,) = asked["fwe"]
    entries = text_of(question).splitlines()[0].split(" ")
    counts = Counter(entries).most_common()
    assert counts[0][0] == "..." and tuple(word for word, _ in counts[1:4]) == question.references
    numbers = [count for _, count in counts[:5]]
    assert len(set(numbers)) == 5
    for rank, count in enumerate(numbers[1:], 2):
        assert count == pytest.approx(numbers[0] / rank**2, abs=1)


@given(size=st.integers(0, 20_000), seed=st.integers(0, 99))
def test_the_frequent_words_can_always_be_told_apart(size: int, seed: int) -> None:
    material = Material(Filler(["x"], lambda text: [0]), Words.of("eval"), ("word",))
    content: Content = ruler_task("fwe", 4096, seed, material, 1)(size)
    counts = Counter(content.document.split())
    (asked,) = content.asked
    other = max(count for word, count in counts.items() if word not in (*asked.references, "..."))
    assert min(counts[word] for word in asked.references) > other


def test_qa_is_made_of_the_users_text(asked: dict[str, list[Question]]) -> None:
    (one,), (two,) = asked["qa_1"], asked["qa_2"]
    assert one.references == ("1820", "the twenties") and one.any_counts and "When did the mill burn?" in text_of(one)
    for context in ("The mill burnt in 1820.", "Ann lives in Ulm.", "Ulm has a spire."):
        assert text_of(one).count(context) == text_of(two).count(context) == 1
    assert len(re.findall(r"^Document \d+:$", text_of(one), re.MULTILINE)) > 4
    assert score("in 1820", one) == 1 and score("in 1821", one) == 0


def test_scores_are_rulers(asked: dict[str, list[Question]]) -> None:
    """The share of the references, whatever their case; any of them in QA."""
    (question,) = asked["niah_multivalue"]
    assert score(" and ".join(question.references[:3]), question) == 0.75
    (uuid,) = asked["niah_single_3"]
    assert score(f"It is {uuid.references[0].upper()}!", uuid) == 1


def test_qa_is_left_out_without_text() -> None:
    assert plan().left_out == ("qa_1", "qa_2")
    assert plan(suites=("needle",)).left_out == ()


def test_nothing_is_shared_with_search(asked: dict[str, list[Question]], speech: Tokenizer, material: Material) -> None:
    """The eval split's words alone, and seeds that neither search nor its verification (from 2000) comes to."""
    train = Words.of("train")
    keys = [key for q in asked["niah_multikey_2"] for key in re.findall(r"numbers for (\S+) is", text_of(q))]
    assert keys and not {word for key in keys for word in key.split("-")} & {*train.adjectives, *train.nouns}
    assert plan(documents=3).seeds == range(FIRST_SEED, FIRST_SEED + 3) and FIRST_SEED == 10_000
    again = next(make_work(plan(tasks=("niah_single_2",)), speech, material))
    other = next(make_work(plan(tasks=("niah_single_2",), seed=1), speech, material))
    assert again == asked["niah_single_2"] != other


def test_needles_stand_where_they_are_said_to(speech: Tokenizer, material: Material) -> None:
    for (question,) in make_work(plan(suites=("needle",)), speech, material):  # type: ignore[misc]
        before, _, after = text_of(question).partition("One of the special magic")
        share = len(before) / (len(before) + len(after.partition("\n")[2]))
        assert question.depth == pytest.approx(share, abs=0.12)


def test_texts_have_their_length(speech: Tokenizer, material: Material) -> None:
    (passage,) = make_work(plan(suites=("perplexity",)), speech, material)
    assert isinstance(passage, Passage)
    assert (len(passage.tokens), passage.scored) == (LENGTH - 1, LENGTH // 4)


def test_a_length_too_short_for_a_task_is_said(speech: Tokenizer, material: Material) -> None:
    with pytest.raises(EvalError, match=r"The task cwe needs at least \d+ tokens .* more than the 256 of --lengths"):
        list(make_work(plan(tasks=("cwe",), lengths=(256,)), speech, material))


@given(start=st.integers(1, 50), steps=st.lists(st.integers(1, 40), min_size=1, max_size=8), goal=st.integers(64, 3000))
def test_a_document_is_the_largest_that_fits(start: int, steps: list[int], goal: int) -> None:
    """Whatever the pieces weigh, one more would be too much."""

    class Counted:
        has_chat_template = False

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [0] * text.count("x")

    def build(size: int) -> Content:
        from gossamer.server.eval.fitting import Asked

        weight = start + sum(steps[n % len(steps)] for n in range(size))
        return Content("x" * weight + f" {size}", (Asked("?", ("a",)),))

    made = fit(Counted(), build, task="t", length=goal, most=0)  # type: ignore[arg-type]
    size = int(made.document.split()[-1])
    assert build(size).document.count("x") + 8 <= goal < build(size + 1).document.count("x") + 8  # 8 for the reply


def test_own_prompts(tmp_path: Path, speech: Tokenizer) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "two and two make", "references": ["4", "four"]},
        {"messages": [{"role": "user", "content": "hello " * 600}], "references": ["hi"], "task": "greeting"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    plain, chat = own_questions(file, speech, 16)
    assert (plain.task, plain.prompt, plain.chat, plain.length) == ("mine", "two and two make", (), 512)
    assert score("four", plain) == 0.5
    assert (chat.task, chat.prompt, chat.references) == ("greeting", "", ("hi",))
    assert chat.length // 2 < chat.tokens + 16 <= chat.length


@pytest.mark.parametrize(
    "line",
    [
        {"references": ["a"]},
        {"prompt": "x"},
        {"prompt": "x", "references": []},
        {"prompt": "x", "references": [""]},
        {"prompt": "", "references": ["a"]},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "references": ["a"]},
        {"messages": [{"role": "user"}], "references": ["a"]},
        {"messages": [], "references": ["a"]},
        {"prompt": "x", "references": ["a"], "task": 3},
    ],
)
def test_wrong_prompts_are_refused(tmp_path: Path, speech: Tokenizer, line: dict[str, object]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(line), "utf-8")
    with pytest.raises(EvalError, match="is wrong in line 1: write"):
        own_questions(file, speech, 16)
