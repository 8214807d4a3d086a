"""The Triton kernels that score pages and tokens under Triton's interpreter, against their torch forms.
test_kernels_score_pages.py runs this file in a process of its own, because TRITON_INTERPRET has to be set before
Triton is imported."""

import os

import pytest
import torch
from mass_cases import SCALE, make_mass_case

from gossamer.kernels.score_pages import bound_mass_torch, page_mass_torch
from gossamer.kernels.score_tokens import label_mass_torch
from gossamer.kernels.triton import score_pages, score_tokens

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_score_pages.py runs this file"

CHANNELS = torch.tensor([[3, 19, 17, 0, 31, 9], [30, 2, 23, 8, 21, -1]], dtype=torch.int32)
SINGLE, HALF = torch.float32, torch.float16
CASES = [  # type of q, type of the tables, queries of a block, heads of a group, head size, several pieces
    (SINGLE, SINGLE, 1, 1, 32, False),
    (HALF, HALF, 1, 8, 32, False),
    (SINGLE, SINGLE, 32, 3, 40, True),
    (HALF, SINGLE, 64, 2, 32, False),
    (HALF, HALF, 16, 16, 32, False),
]


@pytest.mark.parametrize(("of_q", "of_tables", "tile", "ratio", "dim", "small"), CASES)
def test_mass(
    monkeypatch: pytest.MonkeyPatch,
    of_q: torch.dtype,
    of_tables: torch.dtype,
    tile: int,
    ratio: int,
    dim: int,
    small: bool,
) -> None:
    if small:  # so that a short sequence has several pieces and chunks
        monkeypatch.setattr(score_pages, "PIECE", 64)
        monkeypatch.setattr(score_pages, "CHUNK", 4)
    case = make_mass_case([(100, 40), (0, 2), (230, 3)], tile=tile, ratio=ratio, dim=dim, dtype=of_q, released=small)
    given = (case.q, case.kv, case.blocks)
    keys, bounds = case.table(dim, dtype=of_tables), case.bounds(2, dtype=of_tables)
    labels = case.table(64, CHANNELS.shape[1], dtype=of_tables)
    labels[1, ..., -1] = float("nan")  # no channel
    for mine, theirs in (
        (score_pages.launch(*given, keys, scale=SCALE), page_mass_torch(*given, keys, scale=SCALE)),
        (score_pages.launch_bounds(*given, bounds, scale=SCALE), bound_mass_torch(*given, bounds, scale=SCALE)),
        (
            score_tokens.launch(*given, labels, CHANNELS, scale=SCALE),
            label_mass_torch(*given, labels, CHANNELS, scale=SCALE),
        ),
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-4)
        assert torch.equal(mine > 0, theirs > 0) and bool((theirs > 0).any())
