"""The correction for dropped pages: the torch form against the definition in float64, Triton against the torch form."""

import pytest
import torch
from dropped_cases import attended, corrected, dropped_pages, page_means
from kernel_cases import TOLERANCE, Case, make_case
from kernel_checks import run_interpreted

from gossamer.kernels import dropped_pages as dropped_module
from gossamer.kernels.dropped_pages import add_dropped_pages
from gossamer.kernels.layout import NULL_PAGE, UNLIMITED, QueryBlocks, SparseIndex
from gossamer.kernels.paged_prefill import paged_prefill

WINDOWS = ((0, UNLIMITED), (64, 256), (3, 70), (0, 100), (130, 1), (100, 192), (200, 130))
RELEASING = ((64, 256), (3, 170), (0, 200))  # no head sees the middle: its pages are released


def check(case: Case, softcap: float = 0.0, device: str = "cpu") -> None:
    out, lse = attended(case, softcap)
    mean_k, mean_v = page_means(case)
    expected, expected_lse, changed = corrected(case, out, lse, mean_k, mean_v, softcap)
    found, found_lse = out.to(device, copy=True), lse.to(device, copy=True)
    there, means = case.to(device), (mean_k.to(device), mean_v.to(device))
    add_dropped_pages(
        there.q, there.kv, there.blocks, there.index, found, found_lse, *means, scale=case.scale, softcap=softcap
    )
    found, found_lse = found.cpu(), found_lse.cpu()
    assert changed.any() and not changed.all()
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(found[changed].double(), expected[changed], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found_lse[changed].double(), expected_lse[changed], atol=1e-5, rtol=1e-5)
    for mine, before in ((found, out), (found_lse, lse)):
        torch.testing.assert_close(mine[~changed], before[~changed], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("ratio", [1, 2, 4, 16])
def test_definition(ratio: int, dim: int) -> None:
    """Chunks that begin and end inside a tile, a short sequence, and one that has no tiles in the step."""
    spans = [(200, 75), (130, 0), (20, 9), (256, 64)]
    check(make_case(spans, ratio=ratio, dim=dim, tile=128 // ratio if ratio > 1 else 64, density=0.5, heads=(2, 0)))


@pytest.mark.parametrize("tile", [1, 8, 43, 128])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_tiles_and_softcap(tile: int, softcap: float) -> None:
    case = make_case([(190, 1 if tile == 1 else 70), (330, 1 if tile == 1 else 3)], tile=tile, density=0.3)
    case.q.mul_(2)
    check(case, softcap)


@pytest.mark.parametrize("seed", range(3))
def test_windows_and_sinks(seed: int) -> None:
    spans = [(640, 100), (70, 3), (800, 20)]
    check(make_case(spans, windows=WINDOWS, heads=(0, 2, 3), density=0.4, seed=seed, tile=32))


@pytest.mark.parametrize("window", range(185, 193))
def test_a_page_that_some_query_sees_in_part_is_left_out(window: int) -> None:
    """Queries 256 ... 259; page 1 is whole for all of them from a window of 196 on, or 192 with a sink of 68."""
    for sink, whole in ((0, window + 4 >= 196), (68, window + 4 >= 192), (128, True)):
        case = make_case([(256, 4)], windows=[(sink, window + 4)], density=0.0, heads=(0,), ratio=1)
        assert (1 in dropped_pages(case, 0, 0)) == whole
        check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(make_case([(300, 70), (64, 64)], dtype=dtype, density=0.5))


def test_released_pages_stay_out() -> None:
    case = make_case([(700, 100), (450, 40)], windows=RELEASING, seed=3, density=0.3)
    assert (case.kv.table[0] == NULL_PAGE).any()
    check(case)


def test_pages_of_equal_keys_are_not_missed() -> None:
    """Where all keys and values of a page are alike the correction is exact: the answer is that of dense attention."""
    sparse, dense = (make_case([(500, 80)], density=density, ratio=2) for density in (0.3, 1.0))
    for case in (sparse, dense):
        for pool in (case.kv.k, case.kv.v):
            pool.copy_(pool[:, :, :1].expand_as(pool).nan_to_num(0.0))
    results = []
    for case in (sparse, dense):
        out, lse = case.blank()
        paged_prefill(sparse.q, sparse.kv, sparse.blocks, case.index, out, lse, scale=case.scale)
        results.append((out, lse))
    (out, lse), expected = results
    written = lse.isfinite()
    assert not torch.allclose(out[written], expected[0][written], atol=1e-2)
    means = sparse.kv.k[:, :, 0], sparse.kv.v[:, :, 0]
    add_dropped_pages(sparse.q, sparse.kv, sparse.blocks, sparse.index, out, lse, *means, scale=sparse.scale)
    torch.testing.assert_close(out[written], expected[0][written], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse[written], expected[1][written], atol=2e-6, rtol=2e-6)


def test_nothing_dropped_changes_no_bit() -> None:
    case = make_case([(500, 80)], density=1.0)
    out, lse = attended(case)
    before, before_lse = out.clone(), lse.clone()
    add_dropped_pages(case.q, case.kv, case.blocks, case.index, out, lse, *page_means(case), scale=case.scale)
    torch.testing.assert_close(out, before, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(lse, before_lse, atol=0, rtol=0, equal_nan=True)


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(500, 150), (200, 20)], density=0.4, tile=16)
    for most in (1, 1 << 9, 1 << 11):
        monkeypatch.setattr(dropped_module, "WRITTEN", most)
        check(case)


def test_some_of_the_tiles_and_heads() -> None:
    """Tiles that do not adjoin, and a view of one head."""
    case = make_case([(400, 200)], density=0.3, heads=(0, 1, 2))
    out, lse = attended(case)
    mean_k, mean_v = page_means(case)
    expected, _, changed = corrected(case, out, lse, mean_k, mean_v, 0.0)
    index, own = case.index, [0, 2]
    part = SparseIndex(index.start[1:2, own].contiguous(), index.count[1:2, own].contiguous(), index.pages)
    found, before = out.clone(), out.clone()
    kv, blocks, means = case.kv.only(slice(1, 2)), case.blocks.take(own), (mean_k[1:2], mean_v[1:2])
    add_dropped_pages(case.q, kv, blocks, part, found, lse, *means, scale=case.scale)
    touched = torch.zeros_like(changed)
    for n in own:
        row = case.blocks.rows[n]
        touched[row.token : row.token + row.count, 2:4] = True
    touched &= changed
    torch.testing.assert_close(found[touched].double(), expected[touched], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[~touched], before[~touched], atol=0, rtol=0, equal_nan=True)


def test_no_blocks() -> None:
    case = make_case()
    out, lse = case.blank()
    nothing = torch.zeros(2, 0, dtype=torch.int32)
    index, means = SparseIndex(nothing, nothing, nothing[0]), (case.kv.k[:, :, 0], case.kv.v[:, :, 0])
    add_dropped_pages(case.q, case.kv, QueryBlocks.of(64, []), index, out, lse, *means, scale=1.0)
    assert out.isnan().all() and lse.isnan().all()


def test_equal_under_the_interpreter() -> None:
    run_interpreted("kernels_interpreted_dropped_pages.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("ratio", [1, 3, 4, 16])
def test_on_a_gpu(dtype: torch.dtype, dim: int, ratio: int) -> None:
    for windows, softcap in (((), 0.0), (WINDOWS, 3.0), (RELEASING, 0.0)):
        spans = [(200, 75), (130, 0), (20, 9), (700, 300)]
        options = {"ratio": ratio, "dim": dim, "dtype": dtype, "windows": windows, "density": 0.4}
        check(make_case(spans, tile=max(8, 128 // ratio), **options), softcap, "cuda")  # type: ignore[arg-type]
