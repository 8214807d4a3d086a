"""antidiagonal_mass under Triton's interpreter, against its torch form; test_kernels_antidiagonal.py runs this file."""

import os

import pytest
import torch
from kernel_cases import make_case

from gossamer.kernels.antidiagonal import antidiagonal_mass_torch
from gossamer.kernels.layout import NULL_PAGE
from gossamer.kernels.triton import antidiagonal

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_antidiagonal.py runs this file"

SPANS = [(140, 75), (130, 0), (20, 9), (330, 40)]
RELEASING = ((64, 128), (3, 70))
F32, F16 = torch.float32, torch.float16
CASES = [  # query heads per KV head, head size, tile, stride, type, windows
    (1, 64, 64, 16, F32, ()),
    (2, 64, 64, 8, F16, RELEASING),
    (4, 96, 32, 16, F32, RELEASING),
    (16, 64, 8, 16, F16, RELEASING),
    (16, 32, 64, 8, F32, ()),
    (3, 32, 42, 16, F32, RELEASING),
    (2, 128, 1, 4, F32, RELEASING),
    (2, 32, 64, 64, F32, RELEASING),
    (2, 32, 32, 2, F16, ()),
]


@pytest.mark.parametrize(("ratio", "dim", "tile", "stride", "dtype", "windows"), CASES)
def test_equal(
    ratio: int, dim: int, tile: int, stride: int, dtype: torch.dtype, windows: tuple[tuple[int, int], ...]
) -> None:
    spans = [(past, min(new, 1) if tile == 1 else new) for past, new in SPANS]
    case = make_case(spans, ratio=ratio, dim=dim, tile=tile, windows=windows, dtype=dtype, heads=(2, 0))
    case.q.mul_(4)
    assert bool((case.kv.table[3] == NULL_PAGE).any()) == bool(windows)
    found = antidiagonal.launch(case.q, case.kv, case.blocks, stride, scale=case.scale)
    expected = antidiagonal_mass_torch(case.q, case.kv, case.blocks, stride, scale=case.scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected > 0).any()


def test_blocks_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SPANS, tile=16, dim=32, ratio=2)
    monkeypatch.setattr(antidiagonal, "PART_BYTES", 4 * 2 * 2 * case.kv.table.shape[1] * 3)  # three blocks
    found = antidiagonal.launch(case.q, case.kv, case.blocks, 16, scale=case.scale)
    expected = antidiagonal_mass_torch(case.q, case.kv, case.blocks, 16, scale=case.scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
