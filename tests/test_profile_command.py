"""`gossamer profile`: from a model to a policy that the server runs."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from command_checks import complaint, run
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.policy_file import load_policy_file
from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.profiling import candidates, profiler, subject
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.device_times import load_device_profile
from gossamer.attention.profiling.fidelity import Fidelity, Trial
from gossamer.attention.profiling.prompts import Document
from gossamer.attention.profiling.tasks import TASKS

COMMAND = ("profile",)
QUICK = ("--lengths", "768", "--questions", "2", "--device", "cpu", "--threads", "1", "--point", "near=10:0.5")
MEMORY = ("--optimise", "memory")  # so that no choice hangs on what was measured of the device
KEPT = {  # of the ladder, so that a test takes seconds
    "dense",
    "sink-recent (sink 64, recent 64)",
    "sink-recent (sink 64, recent 128)",
    "block-sparse (score mean, budget share 0.25, recent 128)",
    "vertical-slash (columns 128, diagonals 4, probe 64)",
    "block-sparse (score bounds, budget tokens 512, recent 128)",
}


def few(phase: Phase, *, labels: str | None, gates: str | None) -> tuple[Candidate, ...]:
    own = candidates.ladder(phase, labels=labels, gates=gates)
    return tuple(each for each in own if each.text in KEPT or ("tokens 128)" in each.text and "double" in each.kind))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def profiled(folder: Path) -> Path:
    """A policy of the packaged demo model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiler, "ladder", few)
        patch.setattr(subject, "ASKED", [TASKS["multikey"], TASKS["pairs"]])
        result = run(COMMAND, *QUICK, *MEMORY, "-o", folder / "demo.yaml")
        assert result.exit_code == 0, result.output
        assert "near" in result.stdout
        assert "gossamer serve gossamer-demo --attention-policy" in result.stdout
    return folder / "demo.yaml"


def test_the_policy_is_one_that_the_server_runs(profiled: Path) -> None:
    file = load_policy_file(profiled)
    policy = file.policy(Artefacts(profiled.parent))
    assert policy.names == ("near", "exact")
    assert policy.point("exact").is_dense
    assert not policy.point("near").is_dense
    assert "keep:" in profiled.read_text("utf-8")
    assert (file.model.layers, file.model.kv_heads, file.model.query_heads, file.model.head_dim) == (4, 4, 8, 64)
    assert file.provenance.source == "profiled"
    assert "command" not in file.provenance.note
    for said in ("768 tokens", "seed 0", "near:", "unseen", "torch", "commit"):
        assert said in file.provenance.note
    assert run(("policy", "check"), profiled, "--model", "gossamer-demo").exit_code == 0


def test_a_report_lies_beside_it(profiled: Path) -> None:
    page, text = (profiled.with_suffix(ending).read_text("utf-8") for ending in (".html", ".md"))
    for shown in (page, text):
        assert "near" in shown
        assert "768" in shown
    for known in ("commit", "machine", "command"):
        assert f"| {known} | " in text


def test_what_lies_beside_it_can_be_used(profiled: Path) -> None:
    labels = load_file(profiled.with_name("demo-labels.safetensors"))
    for layer in range(4):
        channels = labels[f"layers.{layer}"]
        assert channels.sort(-1).values.tolist() == [list(range(64))] * 4
        assert ((channels[:, 1::2] - channels[:, ::2]).abs() == 32).all()  # rotary pairs stand together
    device = load_device_profile(profiled.with_name("demo-device.json"))
    assert (device.ratio, device.head_dim) == (2, 64)
    assert device.decode.attend.each.at(128) > 0


def test_it_goes_on_where_it_was(profiled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = profiled.read_text("utf-8")
    monkeypatch.setattr(profiler, "ladder", few)
    monkeypatch.setattr(subject, "ASKED", [TASKS["multikey"], TASKS["pairs"]])

    def never(*_: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("gossamer.attention.profiling.learning._read", never)
    result = run(COMMAND, *QUICK, *MEMORY, "-o", profiled)
    assert result.exit_code == 0, result.output
    assert "Going on where an earlier profile" in result.stdout
    assert profiled.read_text("utf-8") == before
    beside = profiled.with_name("demo-device.json")
    again = run(COMMAND, *QUICK, "--device-profile", beside, "--memory-weight", "1", "-o", profiled)
    assert again.exit_code == 0, again.output
    assert "keep:" in profiled.read_text("utf-8")


def test_it_compares_with_the_same_backend_for_every_head(
    profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decodes in other ways reads prompts once; each is told what it would have been told alone."""
    monkeypatch.setattr(profiler, "ladder", few)
    monkeypatch.setattr(subject, "ASKED", [TASKS["multikey"], TASKS["pairs"]])
    together, alone = [], []
    try_decodes, try_point = Fidelity.try_decodes, Fidelity.try_point

    def tried(self: Fidelity, policies: list[AttentionPolicy], documents: list[Document], tick: Any) -> list[Trial]:
        found = try_decodes(self, policies, documents, tick)
        together.extend(each.divergence() for each in found)
        alone.extend(try_point(self, policy, documents, tick).divergence() for policy in policies)
        return found

    monkeypatch.setattr(Fidelity, "try_decodes", tried)
    shutil.copytree(profiled.parent, tmp_path / "own")
    result = run(COMMAND, *QUICK, *MEMORY, "--compare", "-o", tmp_path / "own" / "demo.yaml")
    assert result.exit_code == 0, result.output
    kinds = {phase: {each.kind for each in few(phase, labels="l", gates=None)} - {"dense"} for phase in PHASES}
    report = (tmp_path / "own" / "demo.md").read_text("utf-8")
    assert f"Of {len(kinds['prefill']) + len(kinds['decode'])} comparisons" in report
    assert len(together) == len(kinds["decode"]) == 3
    assert together == pytest.approx(alone, rel=0.03)  # ends of prompts are cut into chunks in another way


def test_rivals_choose_also_where_that_is_not_worth_it() -> None:
    above = {"prefill": {"slow": 4096, "fast": 512, "at once": 0}, "decode": {"never": 8192}}
    assert profiler._acting(above, 4096) == {
        "prefill": {"slow": 0, "fast": 512, "at once": 0},
        "decode": {"never": 0},
    }


def test_it_stops_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr("gossamer.server.profile.run.profile", stopped)
    before = signal.getsignal(signal.SIGTERM)
    result = run(COMMAND, *QUICK, "-o", tmp_path / "p.yaml")
    assert result.exit_code == 130
    assert "Stopped; the same command goes on from here." in result.stderr
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_device_profile_for_other_heads_is_refused(profiled: Path, tmp_path: Path) -> None:
    raw = json.loads(profiled.with_name("demo-device.json").read_text("utf-8"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(raw | {"head_dim": 128}), "utf-8")
    said = run(COMMAND, *QUICK, "--device-profile", other, "-o", tmp_path / "p.yaml")
    assert said.exit_code == 1
    assert "is for 2 query heads of 128 channels per KV head, but this model has 2 of 64" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lengths", "4096,x"), "--lengths is 'x': give a whole number from 512"),
        (("--lengths", "100"), "--lengths is '100'"),
        (("--documents", "0"), "--documents is '0'"),
        (("--point", "Fast=1:1"), "--point is 'Fast=1:1': write NAME=POINTS:NATS"),
        (("--point", "fast=1"), "--point is 'fast=1'"),
        (("--point", "a=1:1", "--point", "a=2:1"), "names must differ"),
        (("--point", "exact=1:1"), "names must differ"),
        (("--optimise", "speed"), "give one of latency, throughput, memory"),
        (("--memory-weight", "2"), "give a number from 0 to 1"),
        (("--out", "policy.json"), "let its name end in .yaml"),
        (("--out", "."), "which is a directory"),
        (("--dtype", "int8"), "dtype"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(arguments: tuple[str, ...], said: str) -> None:
    assert said in complaint(COMMAND, 2, *arguments)


def test_wrong_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    out = ("-o", tmp_path / "p.yaml")
    assert "leave --device-profile out" in complaint(COMMAND, 1, "--device-profile", tmp_path / "none.json", *out)
    assert "give a plain text file" in complaint(COMMAND, 1, "--data", tmp_path / "none.txt", *out)
    (tmp_path / "short.txt").write_text("one line\n", "utf-8")
    assert "too few to hold some out" in complaint(COMMAND, 1, "--data", tmp_path / "short.txt", *out)
    assert "config.json" in complaint(COMMAND, 1, tmp_path, *out)


def test_a_length_that_is_too_short_for_the_tasks_is_said(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")  # a token per byte: sixteen facts need more
    said = run(COMMAND, tmp_path / "model", "--lengths", "512", "--device", "cpu", "-o", tmp_path / "p.yaml")
    assert said.exit_code == 1
    assert "Task multikey needs" in said.stderr
