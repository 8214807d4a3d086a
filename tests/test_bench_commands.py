"""`gossamer bench kernels`: the real command on tiny shapes, and every wrong input."""

import json
from functools import partial
from pathlib import Path

import command_checks
import pytest
import torch

from gossamer.server.bench import ceilings, kernel_table

SIZES = ("--lengths", "300,128", "--heads", "4,2,16", "--batch", "2", "--tokens", "128", "--rounds", "1")
TINY = ("--device", "cpu", *SIZES)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceilings are measured on little."""
    for table, size in ((ceilings.MATRIX, 64), (ceilings.COPIED, 4096), (ceilings.READ, 4096)):
        monkeypatch.setitem(table, "cpu", size)


run, complaint = (
    partial(command_checks.run, ("bench", "kernels")),
    partial(command_checks.complaint, ("bench", "kernels")),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_and_the_file_say_the_same(tmp_path: Path, dtype: str) -> None:
    result = run(*TINY, "--dtype", dtype, "--share", 0.5, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"command", "commit", "device", "versions", "ceilings", "share", "rounds"} <= found.keys()
    assert found["shape"] == {"heads": [4, 2, 16], "dtype": dtype, "device": "cpu"}
    rows = found["results"]
    printed = [line for line in result.stdout.splitlines() if " prefill " in line or " decode 2 x " in line]
    assert len(printed) == len(rows)
    for line, row in zip(printed, rows, strict=True):
        assert line.startswith(row["op"]) and str(row["length"]) in line
        assert (row["density"] is None) == (not row["op"].startswith("attention"))
        assert row["seconds"] > 0 and row["bytes"] > 0 and row["times_dense"] > 0 and row["roofline_share"] > 0
    assert found["ceilings"]["bytes_per_second"] > 0


def test_every_operation_is_there() -> None:
    rows = list(measured())
    ops = {row.op for row in rows if row.phase == "prefill"}
    assert ops == {
        *("attention, dense", "attention, sparse", "attention, torch", "dropped pages", "store"),
        *("select: mean keys", "select: gate", "select: probe", "select: antidiagonal 8", "select: antidiagonal 16"),
        *("choose: top-k", "choose: top-p", "build index"),
        *("write means", "write bounds", "write labels", "write gate pools"),
    }
    ops = {row.op for row in rows if row.phase == "decode"}
    assert ops == {
        *("attention, dense", "attention, sparse", "attention, torch", "store", "choose: tokens"),
        *("select: mean keys", "select: gate", "select: bounds", "select: labels"),
        *("choose: top-k", "choose: top-p", "build index"),
    }
    for row in rows:
        if row.op == "attention, dense":
            assert row.density == 1 and row.times_dense == 1
        if row.op == "attention, sparse" and row.length == 1000:
            assert row.density is not None and row.density < 0.5


def measured() -> list[kernel_table.Row]:
    from gossamer.server.bench.layer import Shape
    from gossamer.server.bench.work import Ceilings

    settings = kernel_table.Settings(Shape(4, 2, 16, torch.float32, "cpu"), (1000,), 2, 0.25, 256, 1)
    return list(kernel_table.measure(settings, Ceilings(1e12, 1e10), lambda line: None))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "tpu"), "--device must be one of auto, cpu, cuda, not 'tpu'"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--lengths", "8k,x"), "--lengths is 'x': expected a number of tokens"),
        (("--lengths", ""), "--lengths is ''"),
        (("--lengths", "127"), "--lengths is '127': expected 128 to"),
        (("--lengths", "9" * 5000), "--lengths is"),
        (("--heads", "32,8"), "give three numbers"),
        (("--heads", "32,8,a"), "--heads is 'a': expected a whole number"),
        (("--heads", "32,0,64"), "--heads is '0'"),
        (("--heads", "9,2,64"), "the query heads must be 1 to 128 times the KV heads"),
        (("--heads", "2,4,64"), "the query heads must be"),
        (("--heads", "258,2,64"), "the query heads must be"),
        (("--heads", "8,2,63"), "the head size must be a multiple of 8"),
        (("--heads", "8,2,512"), "from 8 to 256"),
        (("--batch", "0"), "--batch is '0': expected 1 to 4096"),
        (("--batch", "2.5"), "--batch is '2.5': expected a whole number"),
        (("--share", "0"), "--share is '0': give a number above 0 and at most 1"),
        (("--share", "nan"), "--share is 'nan'"),
        (("--share", "much"), "--share is 'much'"),
        (("--tokens", "0"), "--tokens is '0'"),
        (("--tokens", "-3"), "--tokens is '-3': expected a number of tokens"),
        (("--rounds", "0"), "--rounds is '0': expected 1 to 1000"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: tuple[str, ...], said: str) -> None:
    assert said in complaint(2, *arguments)


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    assert "is a folder" in complaint(1, *TINY, "--json", tmp_path)
    assert "there is no folder" in complaint(1, *TINY, "--json", tmp_path / "missing" / "found.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert "torch finds no CUDA GPU here" in complaint(1, "--device", "cuda")


def test_what_does_not_fit_is_said_after_what_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def decode(*_: object) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(kernel_table, "decode", decode)
    result = run(*TINY, "--json", tmp_path / "found.json")
    assert result.exit_code == 1
    assert "decode at 300 does not fit in the device's memory; give shorter --lengths" in result.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    assert {(row["phase"], row["length"]) for row in rows} == {("prefill", 300)} and "prefill 300" in result.stdout


def test_other_faults_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise RuntimeError("a kernel is wrong")

    monkeypatch.setattr(kernel_table, "decode", decode)
    with pytest.raises(RuntimeError, match="a kernel is wrong"):
        run(*TINY)
