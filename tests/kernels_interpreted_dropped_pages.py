"""add_dropped_pages under Triton's interpreter, against its torch form; run by test_kernels_dropped_pages.py."""

import os

import pytest
import torch
from dropped_cases import attended, page_means
from kernel_cases import make_case

from gossamer.kernels.dropped_pages import add_dropped_pages_torch
from gossamer.kernels.layout import UNLIMITED
from gossamer.kernels.triton import dropped_pages

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_dropped_pages.py runs this file"

SPANS = [(200, 75), (130, 0), (20, 9), (700, 20)]
WINDOWS = ((0, UNLIMITED), (64, 256), (3, 170), (0, 100), (130, 1), (100, 192), (200, 130))
RELEASING = ((64, 256), (3, 170))
F32, F16 = torch.float32, torch.float16
CASES = [  # query heads per KV head, head size, tile, softcap, type, windows
    (1, 64, 64, 0.0, F32, ()),
    (2, 64, 64, 2.0, F16, WINDOWS),
    (4, 96, 32, 0.0, F32, RELEASING),
    (16, 64, 8, 0.0, F16, WINDOWS),
    (3, 128, 42, 2.0, F32, WINDOWS),
    (2, 32, 1, 0.0, F32, ()),
]


@pytest.mark.parametrize(("ratio", "dim", "tile", "softcap", "dtype", "windows"), CASES)
def test_equal(
    ratio: int, dim: int, tile: int, softcap: float, dtype: torch.dtype, windows: tuple[tuple[int, int], ...]
) -> None:
    spans = [(past, min(new, 1) if tile == 1 else new) for past, new in SPANS]
    case = make_case(spans, ratio=ratio, dim=dim, tile=tile, windows=windows, dtype=dtype, heads=(2, 0), density=0.4)
    before = attended(case, softcap)
    results = []
    for kernel in (dropped_pages.launch, add_dropped_pages_torch):
        out, lse = (x.clone() for x in before)
        means = page_means(case)
        kernel(case.q, case.kv, case.blocks, case.index, out, lse, *means, scale=case.scale, softcap=softcap)
        results.append((out, lse))
    tolerance = 1e-5 if dtype == F32 else 1e-3
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance, equal_nan=True)
    same = [(after == old) | old.isnan() for (_, after), old in zip(results, before[1:] * 2, strict=True)]
    assert torch.equal(*same) and not same[0].all(), "both have to leave the same rows alone"


def test_more_pages_than_are_read_together() -> None:
    case = make_case([(64 * 70, 20)], ratio=1, dim=32, heads=(0,), density=0.1)
    before = attended(case)
    results = []
    for kernel in (dropped_pages.launch, add_dropped_pages_torch):
        out, lse = (x.clone() for x in before)
        kernel(case.q, case.kv, case.blocks, case.index, out, lse, *page_means(case), scale=case.scale)
        results.append((out, lse))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, equal_nan=True)
