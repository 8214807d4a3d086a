"""Masses by antidiagonals: the torch form against the definition in float64, Triton against the torch form."""

import math

import pytest
import torch
from kernel_cases import Case, make_case
from kernel_checks import run_interpreted
from torch import Tensor

from gossamer.kernels import antidiagonal
from gossamer.kernels.antidiagonal import antidiagonal_mass
from gossamer.kernels.layout import NULL_PAGE, PAGE_SIZE, UNLIMITED, QueryBlocks

RELEASING = ((64, 256), (3, 70), (0, 100))  # no head sees the middle: its pages are released


def reference(case: Case, stride: int) -> Tensor:
    kv, size = case.kv, case.blocks.size
    mass = torch.zeros(kv.heads.numel(), len(case.blocks), kv.table.shape[1], dtype=torch.float64)
    for n, row in enumerate(case.blocks.rows):
        origin = row.pos // size * size
        past = [page for page in range(origin // PAGE_SIZE) if kv.table[row.seq, page] != NULL_PAGE]
        for g, head in enumerate(kv.heads.tolist()):
            most = dict.fromkeys(past, 0.0)
            for query_head in range(head * kv.ratio, (head + 1) * kv.ratio):
                q = case.q[row.token : row.token + row.count, query_head].double().cpu()
                products = (q @ case.keys[row.seq][:, g].T).tolist()
                mean = _mean_of_groups(products, origin, row.pos, past, stride, case.scale)
                most = {page: max(most[page], mean[page]) for page in past}
            for page in past:
                mass[g, n, page] = most[page] / sum(most.values())
    return mass


def _mean_of_groups(
    products: list[list[float]], origin: int, pos: int, past: list[int], stride: int, scale: float
) -> dict[int, float]:
    """products[i][key] of one head -> for each page the mean over the query groups of their softmax."""
    offsets = [pos + i - origin for i in range(len(products))]
    groups = sorted({offset // stride for offset in offsets})
    mean = dict.fromkeys(past, 0.0)
    for group in groups:
        weight = dict.fromkeys(past, 0.0)
        for page in past:
            for first in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE, stride):
                total = 0.0
                for i, offset in enumerate(offsets):
                    if offset // stride == group:
                        total += products[i][first + stride - 1 - offset % stride]
                weight[page] += math.exp(scale / stride * total)
        for page in past:
            mean[page] += weight[page] / sum(weight.values()) / len(groups)
    return mean


def loud(case: Case) -> Case:
    """Larger queries: sums of many products are small beside their logits' spread otherwise."""
    case.q.mul_(4)
    return case


def check(case: Case, stride: int, tolerance: float = 1e-5) -> None:
    found = antidiagonal_mass(case.q, case.kv, case.blocks, stride, scale=case.scale)
    expected = reference(case, stride)
    assert found.dtype == torch.float32 and expected.max() > 0
    torch.testing.assert_close(found.double().cpu(), expected, atol=tolerance, rtol=10 * tolerance)
    assert torch.equal(found.cpu() == 0, expected == 0)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("ratio", [1, 2, 4, 16])
def test_definition(ratio: int, dim: int) -> None:
    """Chunks that begin and end inside a tile, a short sequence, and one that has no tiles in the step."""
    spans = [(200, 75), (130, 0), (20, 9), (256, 64)]
    check(loud(make_case(spans, ratio=ratio, dim=dim, tile=128 // ratio if ratio > 1 else 64)), 16)


@pytest.mark.parametrize(("tile", "stride"), [(64, 8), (32, 64), (8, 16), (1, 4), (42, 16), (43, 8), (64, 1)])
def test_tiles_and_strides(tile: int, stride: int) -> None:
    spans = [(190, 1 if tile == 1 else 60), (330, 1 if tile == 1 else 3)]
    check(loud(make_case(spans, tile=tile, ratio=2, heads=(2, 0))), stride)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(loud(make_case([(300, 70), (64, 64)], dtype=dtype, shuffled=False)), 8)


def test_released_pages_hold_nothing() -> None:
    case = loud(make_case([(700, 100), (450, 40)], windows=RELEASING, seed=3))
    assert (case.kv.table[0] == NULL_PAGE).any()
    check(case, 16)
    released = case.kv.table[case.blocks.seq.long()] == NULL_PAGE
    found = antidiagonal_mass(case.q, case.kv, case.blocks, 16, scale=case.scale)
    assert (found[:, released] == 0).all()


def test_all_released() -> None:
    """A window so small that nothing past is left."""
    case = make_case([(300, 5)], windows=[(0, 20)])
    found = antidiagonal_mass(case.q, case.kv, case.blocks, 16, scale=case.scale)
    assert (found == 0).all()


def test_windows_do_not_matter() -> None:
    """What a head may see is the index's business."""
    check(loud(make_case([(400, 70)], windows=[(0, UNLIMITED), (3, 200)], seed=2)), 16)


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = loud(make_case([(500, 200), (70, 70)], tile=32))
    for name in ("BATCHED", "READ", "WRITTEN"):
        for most in (1, 1 << 12, 1 << 14):
            with monkeypatch.context() as patch:
                patch.setattr(antidiagonal, name, most)
                check(case, 16)


def test_any_strides_of_the_pool() -> None:
    case = loud(make_case([(300, 70)], shuffled=False))
    expected = antidiagonal_mass(case.q, case.kv, case.blocks, 16, scale=case.scale)
    swapped = case.kv.k.transpose(0, 1).contiguous().transpose(0, 1)
    gaps = torch.cat((case.kv.k, torch.full_like(case.kv.k, torch.nan)), -1)[..., :64]
    for k in (swapped, gaps):
        kv = type(case.kv)(
            k, *(getattr(case.kv, name) for name in ("v", "table", "length", "heads", "sink", "window", "ratio"))
        )
        found = antidiagonal_mass(case.q, kv, case.blocks, 16, scale=case.scale)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_no_blocks() -> None:
    case = make_case()
    assert antidiagonal_mass(case.q, case.kv, QueryBlocks.of(64, []), 16, scale=1.0).shape == (2, 0, 3)


def test_equal_under_the_interpreter() -> None:
    run_interpreted("kernels_interpreted_antidiagonal.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("ratio", [1, 3, 4, 16])
def test_on_a_gpu(dtype: torch.dtype, dim: int, ratio: int) -> None:
    for windows in ((), RELEASING):
        spans = [(200, 75), (130, 0), (20, 9), (700, 300)]
        case = loud(make_case(spans, ratio=ratio, dim=dim, tile=max(8, 128 // ratio), dtype=dtype, windows=windows))
        check(case.to("cuda"), 16, 1e-4)
