"""The scripts for a machine with a GPU, as far as they run without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with a folder of results of its own."""
    module = load("on_gpu", monkeypatch)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    return module


def place(on_gpu: ModuleType, folder: Path, gpu: bool = False) -> Any:
    return on_gpu.Place(gpu, dict(os.environ), folder)


def stage(on_gpu: ModuleType, code: str, name: str = "mine", limit: int = 60, needs_gpu: bool = False) -> Any:
    def command(place: Any, file: Path) -> list[str]:
        return [sys.executable, "-c", f"import pathlib, sys, time; file = pathlib.Path({str(file)!r}); {code}"]

    return on_gpu.Stage(name, "", limit, needs_gpu, on_gpu.plain(command))


WRITES = "file.write_text('{\"results\": [1, 2]}')"


def test_every_kernel_once_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    given = ["--device", "cpu", "--dtype", "float32", "--dim", "32", "--out", str(out)]
    command = [sys.executable, str(BENCHMARKS / "one_of_each_kernel.py"), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["wrong"] == [] and len(found["results"]) == done.stdout.count(" right ") == 40
    assert all(each["right"] and each["error"] == 0 for each in found["results"])
    refused = subprocess.run([*command, "no_such_kernel"], capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 2 and "there is no no_such_kernel" in refused.stderr


def test_a_kernel_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("one_of_each_kernel", monkeypatch)
    here, there = torch.ones(3), torch.tensor([1.0, 1.0, 1.5])
    assert module.compare(lambda x: (x,), here, there, 0.2)[0] is False
    assert module.compare(lambda x: (x,), here, there, 0.3) == (True, pytest.approx(0.5 / 3**0.5))
    for wrong in (torch.ones(4), torch.ones(3).double(), torch.tensor([1.0, 1.0, float("nan")])):
        assert module.compare(lambda x: (x,), here, wrong, 1.0) == (False, "shapes, indices or NaNs differ")
    assert module.compare(lambda x: (x.int(),), here, 2 * here, 1.0)[0] is False

    def raises(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if x is there:
            raise RuntimeError("not on this device")
        return (x,)

    assert module.compare(raises, here, there, 1.0) == (False, "RuntimeError: not on this device")


def test_every_case_names_a_kernel_that_exists_and_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("one_of_each_kernel", monkeypatch)
    names = set(module.cases(32))
    kernels = {path.stem for path in (BENCHMARKS.parent / "kernels" / "triton").glob("*.py")} - {
        "__init__",
        "fp8",
        "tiles",
        "tuned",
    }
    told = {"score_pages": "page_mass", "score_tokens": "label_mass", "antidiagonal": "antidiagonal_mass_8"}
    told |= {"probe": "probe_mass", "choose": "choose_pages_by_count", "page_summaries": "page_means"}
    told |= {"dropped_pages": "add_dropped_pages", "page_loads": "paged_prefill_by_descriptors"}
    assert {told.get(kernel, kernel) for kernel in kernels} <= names


def test_a_stage_is_done_once(on_gpu: ModuleType, tmp_path: Path) -> None:
    own, here = stage(on_gpu, WRITES), place(on_gpu, tmp_path)
    assert on_gpu.outcome(own, here, tmp_path, 60, False) == "2 results"
    assert (tmp_path / "gpu_mine.json").exists() and not (tmp_path / "gpu_mine.part.json").exists()
    assert on_gpu.outcome(own, here, tmp_path, 60, False) == "done before: gpu_mine.json"
    assert on_gpu.outcome(own, here, tmp_path, 60, True) == "2 results"
    (tmp_path / "gpu_mine.json").rename(on_gpu.RESULTS / "gpu_mine.json")
    assert on_gpu.outcome(own, here, tmp_path, 60, False) == "done before: gpu_mine.json"


def test_a_stage_that_fails_is_not_done(on_gpu: ModuleType, tmp_path: Path) -> None:
    here = place(on_gpu, tmp_path)
    assert on_gpu.outcome(stage(on_gpu, f"{WRITES}; sys.exit(3)"), here, tmp_path, 60, False) == "FAILED: exit status 3"
    assert (tmp_path / "gpu_mine.part.json").exists() and not (tmp_path / "gpu_mine.json").exists()
    assert on_gpu.outcome(stage(on_gpu, "pass"), here, tmp_path, 60, False) == "FAILED: exit status 0"
    slow = stage(on_gpu, "time.sleep(60)", limit=1)
    assert on_gpu.outcome(slow, here, tmp_path, 60, False) == "FAILED: it ran too long"
    broken = stage(on_gpu, "file.write_text('x')")
    assert on_gpu.outcome(broken, here, tmp_path, 60, False).startswith("FAILED: JSONDecodeError")


def test_a_stage_is_left_out_for_a_reason(on_gpu: ModuleType, tmp_path: Path) -> None:
    here = place(on_gpu, tmp_path)
    assert on_gpu.outcome(stage(on_gpu, WRITES, needs_gpu=True), here, tmp_path, 60, False).endswith("needs a GPU")
    assert "no time left" in on_gpu.outcome(stage(on_gpu, WRITES), here, tmp_path, 5, False)
    there = place(on_gpu, tmp_path, gpu=True)
    assert "no time left" in on_gpu.outcome(stage(on_gpu, WRITES, limit=200), there, tmp_path, 90, False)
    on_gpu.TUNING = tmp_path / "tune_kernels.py"
    assert "there is no tune" in on_gpu.outcome(stage(on_gpu, WRITES, "tuning"), there, tmp_path, 60, False)


def test_a_sanitizer_that_is_not_there_or_refuses_is_a_result(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "about", dict)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: "compute-sanitizer")
    here, file = place(on_gpu, tmp_path, gpu=True), tmp_path / "found.json"
    ended = [
        on_gpu.Ended(0, "store right 0.0\n========= ERROR SUMMARY: 0 errors\n"),
        on_gpu.Ended(1, "========= Error: Device not supported.\n========= ERROR SUMMARY: 0 errors\n"),
    ]
    said = on_gpu.sanitizer(here, lambda command, seconds: ended.pop(0), file)
    assert said == "memcheck: ERROR SUMMARY: 0 errors; racecheck: Error: Device not supported."
    assert json.loads(file.read_text())["results"][0]["right"] == 1


def test_what_the_tests_said_is_kept(on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "about", dict)
    here, file = place(on_gpu, tmp_path, gpu=True), tmp_path / "found.json"
    cases = '<testcase classname="a" name="b"/>'
    cases += '<testcase classname="a" name="c"><failure message="1 != 2"/></testcase>'
    cases += '<testcase classname="a" name="d"><skipped/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")

    def run(command: list[str]) -> Any:
        assert "gpu" in command and any(str(part).endswith("test_kernels_gpu.py") for part in command)
        return on_gpu.Ended(1, "")

    assert on_gpu.tests(here, run, file) == "1 of 3 tests passed, 1 skipped"
    assert json.loads(file.read_text())["results"] == [{"test": "a.c", "message": "1 != 2"}]


def test_the_stages_are_listed_and_named(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py")]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, timeout=60, check=False)
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) == 10
    wrong = subprocess.run([*command, "all"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2 and "there is no stage all" in wrong.stderr


def test_the_script_that_carries_wheels_is_well_formed() -> None:
    assert subprocess.run(["bash", "-n", str(BENCHMARKS / "carry_wheels.sh")], check=False).returncode == 0
