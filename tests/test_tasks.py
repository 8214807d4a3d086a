"""The task generator: exact lengths, right answers in the document, splits that share nothing, scores."""

import random
import re

import pytest

from gossamer.attention.profiling.tasks import ADJECTIVES, NOUNS, TASKS, Filler, Prompt, Words, make_prompt, score

TEXT = [
    f"line {n} of a text about nothing much, with words{'' if n % 3 else chr(10) + '    and an indented one'}"
    for n in range(400)
]


def encode(text: str) -> list[int]:
    """A tokenizer of words, single digits, signs and line ends."""
    return [hash(piece) for piece in re.findall(r" ?[A-Za-z]+|\d|[^\sA-Za-z\d]|\s", text)]


@pytest.fixture(scope="module")
def filler() -> Filler:
    return Filler("\n".join(TEXT).split("\n"), encode)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [768, 4096])
def test_length_is_met_and_never_passed(task: str, length: int, filler: Filler) -> None:
    for seed in range(5):
        prompt = make_prompt(TASKS[task], length, seed, filler, reserve=64)
        used = len(encode(prompt.user_text(0)))
        assert length - 64 - 70 < used <= length - 64


@pytest.mark.parametrize("task", TASKS)
def test_facts_are_in_the_document_once_and_answers_hold_references(task: str, filler: Filler) -> None:
    prompt = make_prompt(TASKS[task], 2048, 3, filler, questions=4)
    assert prompt.questions
    facts = [line for place, line in enumerate(prompt.lines) if place in prompt.fact_lines]
    for question in prompt.questions:
        for reference in question.references:
            assert any(reference in fact for fact in facts)
        assert score(question.answer, question.references) == 1.0
    assert len(set(facts)) == len(facts)


def test_pieces_encode_as_the_whole(filler: Filler) -> None:
    prompt = make_prompt(TASKS["multikey"], 2048, 1, filler)
    assert encode(prompt.document) == [token for line in prompt.lines for token in encode(line)]


def test_same_arguments_same_prompt_and_other_seeds_other_prompts(filler: Filler) -> None:
    def make(seed: int, split: str = "eval") -> Prompt:
        return make_prompt(TASKS["multikey"], 1024, seed, filler, split=split)  # type: ignore[arg-type]

    assert make(1) == make(1)
    assert make(1).lines != make(2).lines
    assert make(1).lines != make(1, "train").lines


def test_splits_share_no_words() -> None:
    train, held = Words.of("train"), Words.of("eval")
    assert not {*train.adjectives, *train.nouns} & {*held.adjectives, *held.nouns}
    assert len(train.adjectives) + len(held.adjectives) == len(ADJECTIVES)
    assert len(train.nouns) + len(held.nouns) == len(NOUNS)
    assert len(held.adjectives) * len(held.nouns) > 3000, "a haystack of 32K tokens needs this many keys"


def test_chain_keeps_its_order(filler: Filler) -> None:
    prompt = make_prompt(TASKS["variables"], 2048, 5, filler)
    names = prompt.questions[0].references
    facts = [line for line in prompt.lines if line.startswith("VAR ")]
    assert [fact.split()[1] for fact in facts] == list(names)
    assert [fact.split()[-1] for fact in facts[1:]] == list(names[:-1])
    assert facts[0].split()[-1].isdigit()


def test_letters_name_variables_as_ruler_does(filler: Filler) -> None:
    names = make_prompt(TASKS["variables_letters"], 2048, 5, filler).questions[0].references
    assert all(re.fullmatch("[A-Z]{5}", name) for name in names) and len(set(names)) == 5


def test_pairs_fill_the_document(filler: Filler) -> None:
    prompt = make_prompt(TASKS["pairs"], 4096, 2, filler, questions=6)
    assert len(prompt.fact_lines) == len(prompt.lines) > 150
    assert len({question.references for question in prompt.questions}) == 6


def test_messages_and_conversation(filler: Filler) -> None:
    prompt = make_prompt(TASKS["multikey"], 1024, 9, filler, questions=3)
    (alone,) = prompt.messages(1)
    assert alone["role"] == "user"
    assert alone["content"].startswith(prompt.document) and alone["content"].endswith(prompt.questions[1].text)
    turns = prompt.conversation()
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    assert turns[2]["content"] == prompt.questions[1].text


def test_score_counts_shares_without_case() -> None:
    assert score("It is 4821 and ABC.", ["4821", "abc"]) == 1.0
    assert score("It is 4821.", ["4821", "abc"]) == 0.5
    assert score("", ["x"]) == 0.0


def test_too_small_a_length_is_refused(filler: Filler) -> None:
    with pytest.raises(ValueError, match="tokens for its facts"):
        make_prompt(TASKS["multikey"], 128, 0, filler)
    with pytest.raises(ValueError, match="no key-value pair"):
        make_prompt(TASKS["pairs"], 100, 0, filler)
    with pytest.raises(ValueError, match="empty"):
        Filler(["", "  "], encode)
    with pytest.raises(ValueError, match="keys asked for"):
        Words(("red",), ("fox",)).keys(random.Random(0), 2)


def test_filler_wraps_round_and_cuts_to_the_token(filler: Filler) -> None:
    short = Filler(["one two three four five six seven"], encode)
    lines = short.take(random.Random(0), 100)
    assert 95 <= sum(len(encode(line)) for line in lines) <= 100
    assert short.cut("one two three", 3) == "one two\n"
    assert short.cut("one two three", 1) == ""
