"""`gossamer eval` in process: the table, the file, the pictures, and every wrong input."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_checks import complaint, run
from tiny_models import save_tiny_model

from gossamer.attention.packaged import packaged_policies
from gossamer.server.eval import local
from gossamer.server.eval import run as eval_run

COMMAND = ("eval",)
HERE = ("--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's own; the demo model answers the first two."""
    file = tmp_path_factory.mktemp("own") / "mine.jsonl"
    asked = "The pass key for red-hat is 48213.\nThe pass key for old-owl is 90155.\n\nWhat is the pass key for {}?"
    rows = [
        {"messages": [{"role": "user", "content": asked.format("red-hat")}], "references": ["48213"]},
        {"messages": [{"role": "user", "content": asked.format("old-owl")}], "references": ["90155"], "task": "owls"},
        {"messages": [{"role": "user", "content": asked.format("old-owl")}], "references": ["90155", "no such"]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_own_prompts_at_every_point_with_pictures(prompts: Path, tmp_path: Path) -> None:
    """Points of two policies in one engine; the table, the file and the pictures tell the same."""
    found, pictures = tmp_path / "found.json", tmp_path / "pictures"
    policies = ("--policy", "gossamer-demo-mixed", "--policy", "gossamer-demo:balanced", "--policy", "dense")
    asked = ("--suite", prompts, "--suite", "needle", "--lengths", "600", "--documents", "1", "--depths", "0,100")
    result = run(COMMAND, *HERE, *asked, *policies, "--max-tokens", "12", "--json", found, "--plots", pictures)
    assert result.exit_code == 0, result.output
    told = json.loads(found.read_text("utf-8"))
    points = ["dense", "gossamer-demo-mixed:fast", "gossamer-demo:balanced"]
    assert told["points"] == points and told["baseline"] == "dense"
    assert told["notes"] == ["Dense, and so not asked again: gossamer-demo-mixed:exact."]
    assert len(set(told["fingerprints"].values())) == len(points) and len(told["weights"]) == 16
    assert {"command", "commit", "device", "versions"} <= told.keys()
    assert told["plan"]["seeds"] == [10000, 10001] and told["plan"]["split"] == "eval"
    cells = {(cell["task"], cell["point"]): cell for cell in told["cells"]}
    for point in points:
        own = cells["mine", point]
        assert (own["questions"], own["references"], own["found"], own["whole"]) == (2, 3, 2, 1)
        assert own["accuracy"] == 0.75 and cells["owls", point]["accuracy"] == 1
        assert own["difference_to_dense"] == (None if point == "dense" else 0)
    assert cells["owls", "dense"]["prefill_density"] == 1
    assert [(row["depth"], row["length"]) for row in told["needle"] if row["point"] == "dense"] == [(0, 600), (1, 600)]
    assert len(told["answers"]) == 3 * (3 + 2) and told["answers"][0]["reply"].strip().startswith("48213")
    assert "512 tokens" in result.stdout and "600 tokens" in result.stdout
    assert any("mine (2)" in line and "75.0" in line for line in result.stdout.splitlines())
    assert sorted(each.name for each in pictures.iterdir()) == ["accuracy.png", "density.png", "needle.png"]
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in pictures.iterdir())


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT interrupts also where the tests were started in the background, by a shell that has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_answered(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    class Stopping(local.Local):
        asked = 0

        def ask(self, point, questions):  # type: ignore[no-untyped-def]
            Stopping.asked += 1
            if Stopping.asked == 4:  # the second document at the second point
                os.kill(os.getpid(), sent)
            return super().ask(point, questions)

    monkeypatch.setattr(eval_run, "Local", Stopping)
    file = tmp_path / "found.json"
    arguments = ("--suite", prompts, "--policy", "gossamer-demo:fast", "--max-tokens", "8", "--json", file)
    result = run(COMMAND, *HERE, *arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(file.read_text("utf-8"))
    assert [answer["point"] for answer in told["answers"]] == ["dense", "gossamer-demo:fast"]
    assert told["notes"][-1].startswith("Stopped before the end")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--suite", "longbench"), "--suite is 'longbench': give ruler, needle, perplexity, or a file"),
        (("--lengths", "4096,x"), "--lengths is 'x': give a whole number from 256"),
        (("--tasks", "niah_single_9"), "--tasks names 'niah_single_9', which RULER has not"),
        (("--tasks", "qa_1"), "The task qa_1 needs your text: give --qa FILE"),
        (("--suite", "needle", "--tasks", "vt"), "--tasks is for --suite ruler"),
        (("--depths", "50"), "--depths is for --suite needle; add that suite"),
        (("--max-tokens", "50"), "--max-tokens is for --suite FILE"),
        (("--suite", "needle", "--depths", "0,101"), "--depths is '101': give a whole number from 0 to 100"),
        (("--documents", "0"), "--documents is '0'"),
        (("--dtype", "int8"), "dtype"),
        (("--url", "127.0.0.1:8000"), "--url is '127.0.0.1:8000': write it whole"),
        (("--api-key-file", "key"), "--api-key-file is for a server"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(arguments: tuple[str, ...], said: str) -> None:
    assert said in complaint(COMMAND, 2, *arguments)


def test_wrong_files_and_policies_are_refused_in_a_sentence(prompts: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "empty.jsonl").write_text("\n", "utf-8")
    (broken := tmp_path / "broken.jsonl").write_text('{"prompt": \n', "utf-8")
    assert "is empty; give a file of JSON lines" in told(1, "--suite", empty)
    assert "is wrong in line 1: every line must be a JSON object" in told(1, "--suite", broken)
    assert "is empty" in complaint(COMMAND, 1, "--qa", empty)
    assert "there is no folder" in complaint(COMMAND, 1, "--json", tmp_path / "none" / "found.json")
    assert "leave it out" in complaint(COMMAND, 2, "--suite", prompts, "--lengths", "512")
    assert "asked as they are; leave it out" in complaint(COMMAND, 2, "--suite", prompts, "--data", prompts)
    assert "neither a file nor a packaged policy" in told(1, "--policy", "nothing")
    assert "has no operating point 'slow'; it has: exact, balanced, fast" in told(1, "--policy", "gossamer-demo:slow")
    assert "is for a model with layers 32, but this model has layers 4" in told(
        1, "--policy", "Mistral-7B-Instruct-v0.3"
    )
    assert "config.json" in told(1, tmp_path)


def told(code: int, *arguments: object) -> str:
    """The last line on standard error; lines of progress may come before it."""
    result = run(COMMAND, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("gossamer: ") and last.endswith(".")
    return last


def test_two_policies_of_one_name_are_refused(prompts: Path, tmp_path: Path) -> None:
    text = packaged_policies()["gossamer-demo-streaming"].read_text("utf-8")
    (other := tmp_path / "other.yaml").write_text(text.replace("recent: 256", "recent: 128"), "utf-8")
    assert other.read_text("utf-8") != text
    arguments = (*HERE, "--suite", prompts, "--policy", "gossamer-demo-streaming", "--policy", other)
    assert "Two policies are called 'gossamer-demo-streaming' and differ at" in told(1, *arguments)


def test_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    said = told(1, tmp_path / "model", *HERE, "--suite", "perplexity", "--lengths", "8192", "--documents", "1")
    assert "this model has" in said and "positions; give shorter --lengths" in said


def test_a_text_that_is_too_short_for_a_length_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one line\n", "utf-8")
    assert "too few to hold some out" in told(1, "--suite", "perplexity", "--data", tmp_path / "text.txt")
