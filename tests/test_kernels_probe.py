"""Where the newest queries look: the torch form against the definition in float64, Triton against the torch form."""

import math

import numpy as np
import pytest
import torch
from kernel_cases import Case, make_case
from kernel_checks import run_interpreted
from torch import Tensor

from gossamer.kernels import probe as probe_module
from gossamer.kernels.layout import NULL_PAGE, PAGE_SIZE, UNLIMITED, BlockRow, QueryBlocks
from gossamer.kernels.probe import newest_queries, probe_mass

WINDOWS = ((0, UNLIMITED), (64, 256), (3, 70), (0, 100), (130, 1), (100, 65))
RELEASING = ((64, 256), (3, 70), (0, 100))  # no head sees the middle: its pages are released


def reference(case: Case, probe: int) -> tuple[Tensor, Tensor]:
    kv = case.kv
    shape = (kv.heads.numel(), kv.table.shape[0], kv.table.shape[1] * PAGE_SIZE)
    columns, diagonals = np.zeros(shape), np.zeros(shape)
    for seq in range(shape[1]):
        queries = [(row.token + i, row.pos + i) for row in case.blocks.rows if row.seq == seq for i in range(row.count)]
        queries = queries[-probe:]
        resident = (kv.table[seq] != NULL_PAGE).tolist()
        for g, head in enumerate(kv.heads.tolist()):
            sink, window = int(kv.sink[seq, g]), int(kv.window[seq, g])
            for token, pos in queries:
                for query_head in range(head * kv.ratio, (head + 1) * kv.ratio):
                    q = case.q[token, query_head].double().cpu()
                    products = (case.keys[seq][:, g] @ q).tolist()
                    weight = {}
                    for key in range(pos + 1):
                        if resident[key // PAGE_SIZE] and (key > pos - window or key < sink):
                            weight[key] = math.exp(case.scale * products[key])
                    total = sum(weight.values()) * len(queries) * kv.ratio
                    for key, each in weight.items():
                        columns[g, seq, key] += each / total
                        diagonals[g, seq, pos - key] += each / total
    return torch.from_numpy(columns), torch.from_numpy(diagonals)


def check(case: Case, probe: int, tolerance: float = 1e-6, expected_sums: tuple[Tensor, Tensor] | None = None) -> None:
    found = probe_mass(case.q, case.kv, case.blocks, probe, scale=case.scale)
    for mine, expected in zip(found, expected_sums or reference(case, probe), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == expected.shape
        torch.testing.assert_close(mine.double().cpu(), expected, atol=tolerance, rtol=100 * tolerance)
        with_tiles = sorted({row.seq for row in case.blocks.rows})
        sums = torch.zeros(mine.shape[:2])
        sums[:, with_tiles] = 1
        torch.testing.assert_close(mine.cpu().sum(-1), sums, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("ratio", [1, 2, 4, 16])
def test_definition(ratio: int, dim: int) -> None:
    """More queries than asked for, fewer, none, and all of a sequence."""
    spans = [(150, 75), (130, 0), (190, 9), (0, 5), (0, 1)]
    check(make_case(spans, ratio=ratio, dim=dim, tile=128 // ratio if ratio > 1 else 64), 12)


@pytest.mark.parametrize("probe", [1, 63, 64, 65, 200])
def test_probes_of_every_size(probe: int) -> None:
    check(make_case([(70, 130), (20, 44)], ratio=1, heads=(0,)), probe)


@pytest.mark.parametrize("seed", range(3))
def test_windows_and_sinks(seed: int) -> None:
    check(make_case([(300, 60), (70, 3), (500, 20)], windows=WINDOWS, heads=(2, 0, 3), seed=seed), 20)


def test_released_pages_get_nothing() -> None:
    case = make_case([(700, 100), (450, 10)], windows=RELEASING, seed=3)
    assert (case.kv.table[0] == NULL_PAGE).any()
    check(case, 20)


def test_a_released_page_inside_the_window_gets_nothing() -> None:
    case = make_case([(300, 30)])
    case.kv.table[0, 2] = NULL_PAGE
    check(case, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(make_case([(200, 70)], dtype=dtype, shuffled=False), 32)


def test_decode() -> None:
    check(make_case([(200, 1), (63, 1), (0, 1), (64, 1)], tile=1, ratio=4), 64)


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(300, 100), (700, 20)], windows=WINDOWS, seed=1)
    expected = reference(case, 24)
    for name in ("WRITTEN", "READ"):
        for most in (1, 1 << 13):
            with monkeypatch.context() as patch:
                patch.setattr(probe_module, name, most)
                check(case, 24, expected_sums=expected)


def test_newest_queries_span_tiles() -> None:
    rows = [BlockRow(2, 5, 100, 28), BlockRow(2, 33, 128, 64), BlockRow(2, 97, 192, 3), BlockRow(0, 100, 7, 4)]
    blocks = QueryBlocks.of(64, rows)
    assert newest_queries(blocks, 64) == [BlockRow(2, 36, 131, 64), BlockRow(0, 100, 7, 4)]
    assert newest_queries(blocks, 500) == [BlockRow(2, 5, 100, 95), BlockRow(0, 100, 7, 4)]
    assert newest_queries(blocks, 2) == [BlockRow(2, 98, 193, 2), BlockRow(0, 102, 9, 2)]


def test_no_blocks() -> None:
    case = make_case()
    columns, diagonals = probe_mass(case.q, case.kv, QueryBlocks.of(64, []), 64, scale=1.0)
    assert columns.shape == diagonals.shape == (2, 1, 192) and not columns.any() and not diagonals.any()


def test_equal_under_the_interpreter() -> None:
    run_interpreted("kernels_interpreted_probe.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("ratio", [1, 3, 4, 16])
def test_on_a_gpu(dtype: torch.dtype, dim: int, ratio: int) -> None:
    for windows, probe in (((), 64), (WINDOWS, 100), (RELEASING, 5)):
        spans = [(200, 75), (130, 0), (20, 9), (700, 300)]
        case = make_case(spans, ratio=ratio, dim=dim, tile=max(8, 128 // ratio), dtype=dtype, windows=windows)
        found = probe_mass(*(case.to("cuda").q, case.to("cuda").kv, case.to("cuda").blocks), probe, scale=case.scale)
        expected = probe_mass(case.q, case.kv, case.blocks, probe, scale=case.scale)  # held to the definition above
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, atol=1e-5, rtol=1e-3)
