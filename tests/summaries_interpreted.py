"""The Triton forms of the page summaries under Triton's interpreter. test_kernels_summaries.py runs this file in a
process of its own, because TRITON_INTERPRET has to be set before Triton is imported."""

import os

import pytest
import torch
from test_kernels_summaries import TOLERANCE, fill, make_pages, with_holes

from gossamer.kernels.triton import page_summaries

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_summaries.py runs this file"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("dim", "turned"), [(32, 16), (80, 36), (40, 0), (100, 8)])
def test_equals_the_torch_form(dtype: torch.dtype, dim: int, turned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_summaries, "TURNED_PAGES", 2)
    pages = with_holes(make_pages(dim=dim, turned=turned, dtype=dtype, scaling=1.25, full=3))
    for out_dtype in (torch.float32, dtype):
        found = fill(pages, page_summaries, out_dtype)
        for mine, twin in zip(found, fill(pages, dtype=out_dtype), strict=True):
            assert mine[:, pages.physical[1].long()].isfinite().all()
            tolerance = 2 * TOLERANCE[out_dtype]
            torch.testing.assert_close(mine, twin, atol=tolerance, rtol=tolerance, equal_nan=True)
