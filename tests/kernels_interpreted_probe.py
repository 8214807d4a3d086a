"""probe_mass under Triton's interpreter, against its torch form; test_kernels_probe.py runs this file."""

import os

import pytest
import torch
from kernel_cases import make_case

from gossamer.kernels.layout import NULL_PAGE, UNLIMITED
from gossamer.kernels.probe import probe_mass_torch
from gossamer.kernels.triton import probe as kernels

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_probe.py runs this file"

SPANS = [(200, 75), (130, 0), (20, 9), (1100, 20)]
WINDOWS = ((0, UNLIMITED), (64, 256), (3, 70), (0, 100), (130, 1), (100, 65))
RELEASING = ((64, 256), (3, 70))
F32, F16 = torch.float32, torch.float16
CASES = [  # query heads per KV head, head size, tile, probe, type, windows
    (1, 64, 64, 64, F32, ()),
    (2, 64, 64, 70, F16, WINDOWS),
    (4, 96, 32, 20, F32, RELEASING),
    (16, 64, 8, 12, F16, WINDOWS),
    (3, 128, 42, 33, F32, WINDOWS),
    (2, 32, 1, 64, F32, ()),
    (2, 32, 64, 1, F32, RELEASING),
]


@pytest.mark.parametrize(("ratio", "dim", "tile", "probe", "dtype", "windows"), CASES)
def test_equal(
    ratio: int, dim: int, tile: int, probe: int, dtype: torch.dtype, windows: tuple[tuple[int, int], ...]
) -> None:
    spans = [(past, min(new, 1) if tile == 1 else new) for past, new in SPANS]
    case = make_case(spans, ratio=ratio, dim=dim, tile=tile, windows=windows, dtype=dtype, heads=(2, 0))
    found = kernels.launch(case.q, case.kv, case.blocks, probe, scale=case.scale)
    expected = probe_mass_torch(case.q, case.kv, case.blocks, probe, scale=case.scale)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
        assert (theirs > 0).any()


def test_a_released_page_inside_the_window() -> None:
    case = make_case([(300, 30)], dim=32)
    case.kv.table[0, 2] = NULL_PAGE
    found = kernels.launch(case.q, case.kv, case.blocks, 20, scale=case.scale)
    expected = probe_mass_torch(case.q, case.kv, case.blocks, 20, scale=case.scale)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
