"""Every Triton kernel compiles for the GPUs we name, without spilled registers, within their memory, and no worse than
benchmarks/results/compiled_kernels.json says.

No GPU is needed: the compiler runs ahead of time. What it is given is taken from the launches themselves.
"""

import pytest

triton = pytest.importorskip("triton")

from compiled_kernels import RESULTS, Code, compile_all, faults, read  # noqa: E402
from launch_cases import cases  # noqa: E402
from launches import TARGETS, Launch, kernels, record  # noqa: E402

REGENERATE = f"run python benchmarks/compiled_kernels.py --json benchmarks/results/{RESULTS.name}"
RARE = ("aligned", "alone", "large pool", "ratio", "softcap", "tokens", "tiles", "stride 4", "stride 32")
WITH_MATRICES = {  # what computes with tiles of 64 rows and more
    *("paged_prefill._paged_prefill", "antidiagonal._page_logits", "dropped_pages._add_dropped_pages"),
    *("probe._row_lse", "probe._page_sums", "score_pages._sum_pieces", "score_pages._share_columns"),
}
# A thread may have 255 registers. Where it has half of them and keeps a few bytes in memory all the same, ptxas chose
# that, so that more threads fit.
CHOSEN = 24  # bytes
HALF = 128  # registers


@pytest.fixture(scope="module")
def every() -> list[Launch]:
    return record(cases())


@pytest.fixture(scope="module")
def compiled(every: list[Launch]) -> list[tuple[Launch, Code]]:
    """A part of them, for each takes a second: every kernel for every GPU, and most of what Hopper runs in bfloat16."""
    part = [launch for launch in every if _in_part(launch)]
    return list(zip(part, compile_all(part), strict=True))


def _in_part(launch: Launch) -> bool:
    type, dim, name = launch.variant
    if "descriptors" in name and dim != 128 and "rows" not in name:
        return False
    rare = any(word in name for word in RARE)
    if launch.capability != 90:
        return not type or (type == "bf16" and dim == 128 and not rare)
    if type == "bf16":
        return dim == 128 or launch.kernel.startswith("paged_")
    return not type or (type == "fp32" and dim == 128 and not rare)


def test_every_kernel_is_among_them(every: list[Launch], compiled: list[tuple[Launch, Code]]) -> None:
    wanted = kernels()
    assert {launch.kernel for launch in every} == wanted
    for capability in TARGETS:
        assert {launch.kernel for launch, _ in compiled if launch.capability == capability} == wanted


def test_nothing_is_spilled_and_everything_fits(compiled: list[tuple[Launch, Code]]) -> None:
    assert _faults({launch.name: code for launch, code in compiled}) == {}


def test_the_matrix_kernels_use_what_hopper_has_for_them(compiled: list[tuple[Launch, Code]]) -> None:
    seen, without = set(), []
    for launch, code in compiled:
        if launch.capability == 90 and launch.kernel in WITH_MATRICES and launch.variant.type != "fp32":
            if code.rows >= 64 and not code.wgmma:
                without.append(launch.name)
            if code.rows >= 64:
                seen.add(launch.kernel)
    assert not without
    assert seen == WITH_MATRICES


def test_a_prompt_s_tile_is_one_program(compiled: list[tuple[Launch, Code]]) -> None:
    """Up to 128 dimensions, from Hopper on: its keys are read once. On Blackwell there is no room to widen FP8 then."""
    for launch, code in compiled:
        if launch.kernel == "paged_prefill._paged_prefill" and launch.capability >= 90:
            fp8 = launch.capability >= 100 and "fp8" in launch.variant.name and launch.variant.dim > 64
            assert code.rows == 128 or launch.variant.dim > 128 or launch.variant.type == "fp32" or fp8, launch.name


def test_descriptors_are_read_by_the_copy_engine(compiled: list[tuple[Launch, Code]]) -> None:
    held = {launch.name.removeprefix("paged_prefill._paged_prefill "): launch for launch, _ in compiled}
    names = ("bf16 d128 descriptors sm_90", "bf16 d128 sm_90")
    assert ["cp.async.bulk.tensor" in held[name].compile().asm["ptx"] for name in names] == [True, False]


def test_the_recorded_table_is_of_these_launches(every: list[Launch]) -> None:
    _, recorded = read()
    assert recorded.keys() == {launch.name for launch in every}, REGENERATE


def test_the_recorded_table_has_no_faults() -> None:
    _, recorded = read()
    assert _faults(recorded) == {}


def test_nothing_became_worse(compiled: list[tuple[Launch, Code]]) -> None:
    version, recorded = read()
    if version.split(".")[:2] != triton.__version__.split(".")[:2]:
        pytest.skip(f"the numbers are of Triton {version}")
    worse = {launch.name: found for launch, code in compiled if (found := _worse(code, recorded[launch.name]))}
    assert not worse, f"if this is meant, {REGENERATE}"


def _worse(code: Code, recorded: Code) -> list[str]:
    allowed = {
        "registers": recorded.registers + 8,
        "shared": recorded.shared * 1.1,
        "instructions": recorded.instructions * 1.1 + 16,
        "loads": recorded.loads * 1.2 + 4,
    }
    return [
        f"{name}: {getattr(code, name)}, was {getattr(recorded, name)}"
        for name, most in allowed.items()
        if getattr(code, name) > most
    ]


def _faults(codes: dict[str, Code]) -> dict[str, list[str]]:
    """But for what ptxas chose."""
    found = {}
    for name, code in codes.items():
        allowed = CHOSEN if code.registers <= HALF else 0
        if reasons := faults(int(name.rpartition("sm_")[2]), code, allowed):
            found[name] = reasons
    return found
