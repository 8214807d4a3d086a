"""Tiles that were measured on a device, where the kernels look for them, and the script that measures."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gossamer.kernels.triton import paged_prefill, tuned
from gossamer.server.bench.layer import Layer, Shape

CUDA = torch.device("cuda")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, int]]:
    """What the file of this device holds."""
    tiles: dict[str, dict[str, int]] = {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test 9000")
    monkeypatch.setattr(tuned, "tiles_of", lambda device: tiles if device == "NVIDIA Test 9000" else {})
    return tiles


def test_what_was_measured_wins(known: dict[str, dict[str, int]]) -> None:
    own = {"M": 64, "num_warps": 4}
    assert tuned.tuned("some", own, CUDA, dim=128, tokens=True) == own
    known["some dim=128 tokens=1"] = {"num_warps": 8}
    assert tuned.tuned("some", own, CUDA, dim=128, tokens=True) == {"M": 64, "num_warps": 8}
    assert tuned.tuned("some", own, CUDA, dim=64, tokens=True) == own
    assert tuned.tuned("some", own, torch.device("cpu"), dim=128, tokens=True) == own


def test_a_call_with_few_rows_keeps_its_tile(known: dict[str, dict[str, int]]) -> None:
    known["some"] = {"M": 64, "num_warps": 8}
    assert tuned.tuned("some", {"M": 32, "num_warps": 4}, CUDA) == {"M": 32, "num_warps": 4}
    assert tuned.tuned("some", {"M": 128, "num_warps": 4}, CUDA) == {"M": 64, "num_warps": 8}
    assert tuned.tuned("some", {"M": 32, "num_warps": 4}, CUDA, most=64) == {"M": 64, "num_warps": 8}
    assert tuned.tuned("some", {"M": 16, "num_warps": 4}, CUDA, most=32) == {"M": 16, "num_warps": 4}


def test_files_are_named_by_their_device() -> None:
    assert tuned.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert tuned.file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.json"
    assert tuned.tiles_of("a device that nobody has") == {}


def test_shipped_files_name_options_that_kernels_have() -> None:
    folder = files("gossamer") / "configs" / "kernels"
    for file in folder.iterdir() if folder.is_dir() else ():
        found = json.loads(file.read_text("utf-8"))
        assert found["device"] and file.name == tuned.file_name(found["device"])
        for name, options in found["tiles"].items():
            assert name.split()[0] in ("paged_prefill", "paged_decode", "score_pages", "antidiagonal"), name
            assert set(options) <= {"M", "COLUMNS", "TMA", "num_warps", "num_stages", "per_sm"}, name


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import tune_kernels

    return tune_kernels


def test_every_kernel_that_has_tiles_is_tuned(script, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", lambda *args, **options: None)
    shape = Shape(4, 2, 32, torch.float16, "cpu")
    with torch.inference_mode():
        indices = [list(script._attention(layer, q, blocks)) for layer, q, blocks in layers(shape)]
        monkeypatch.setattr(script, "_attention", lambda *layer: indices.pop(0))
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
        names = [case.name for case in script.cases(shape, 512, 3)]
    kinds = ["paged_decode"] * 2 + ["score_pages"] * 3 + ["paged_prefill"] * 2 + ["score_pages"] * 2
    assert [name.split()[0] for name in names] == [*kinds, "antidiagonal", "antidiagonal"]
    assert len(set(names)) == len(names)
    assert "paged_decode dim=32 bytes=2 tokens=1" in names and "antidiagonal dim=32 bytes=2 stride=8" in names


def layers(shape: Shape):  # type: ignore[no-untyped-def]
    for layer, prompts in ((Layer(shape, 3, 512), False), (Layer(shape, 1, 512), True)):
        blocks = layer.prompts() if prompts else layer.newest()
        yield layer, layer.queries(blocks), blocks


def test_the_fastest_tile_that_is_right_is_taken(script, known: dict[str, dict[str, int]]) -> None:  # type: ignore[no-untyped-def]
    own = {"M": 64, "num_warps": 4, "num_stages": 3}

    def options() -> dict[str, int]:
        return tuned.tuned("some", own, CUDA, dim=64)

    def run() -> Tensor:
        if options()["num_warps"] == 8 and options()["M"] == 32:
            raise RuntimeError("out of resource: shared memory")
        return torch.full((3,), 1e-6 if options()["num_stages"] != 6 else 1.1e-6)

    def seconds(run: Callable[[], Tensor]) -> float:
        run()
        return {1: 5.0, 2: 0.5, 6: 0.1}.get(options()["num_stages"], 1.0) + 0.1 * (options()["M"] != 64)

    found = script.tune(script.Case("some dim=64", own, run), seconds)
    assert found is not None and found[0]["num_stages"] == 2 and found[0]["M"] == 64 and found[1] == 2.0
    assert script.tune(script.Case("some dim=64", own, run), lambda run: 1.0) is None


@pytest.mark.parametrize(("capability", "descriptors"), [(80, {0}), (90, {0, 1})])
def test_ways_of_loading_are_tried_where_the_gpu_has_them(  # type: ignore[no-untyped-def]
    script, monkeypatch: pytest.MonkeyPatch, capability: int, descriptors: set[int]
) -> None:
    monkeypatch.setattr(script, "capability", lambda device: capability)
    own = paged_prefill.tile(256, 2, 128, tokens=False, capability=90)
    found = list(script.candidates(own | {"most": 128}))
    assert {each["TMA"] for each in found} == descriptors and {each["M"] for each in found} == {32, 64, 128}
    assert {each["num_warps"] for each in found if each["per_sm"] == 2} == {8}  # two of four warps share one anyway
    assert own.items() >= {"M": 64, "TMA": 0, "per_sm": 1}.items()
    assert all(any(own[name] != value for name, value in each.items()) for each in found)


def test_what_was_not_written_is_wrong(script) -> None:  # type: ignore[no-untyped-def]
    right = torch.tensor([1e-5, 2e-5])
    assert script.difference(right.clone(), right) == 0
    assert script.difference(torch.tensor([1e-5, float("nan")]), right) == float("inf")
    assert script.difference(torch.zeros(2), right) == 1


def test_tuning_ends_when_its_time_is_over(script, known: dict[str, dict[str, int]]) -> None:  # type: ignore[no-untyped-def]
    case = script.Case("some", {"M": 64, "num_warps": 4, "num_stages": 3}, lambda: torch.ones(2))
    with pytest.raises(TimeoutError):
        script.tune(case, lambda run: 1.0, ends=0.0)
