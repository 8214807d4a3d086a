"""The Triton form of readable_runs under Triton's interpreter. test_index.py runs this file in a process of its own,
because TRITON_INTERPRET has to be set before Triton is imported."""

import os

import pytest
from test_index import check_runs, random_selection

from gossamer.kernels.runs import readable_runs_torch
from gossamer.kernels.triton import runs

assert os.environ.get("TRITON_INTERPRET") == "1", "test_index.py runs this file"


@pytest.mark.parametrize("tile", [1, 24])
@pytest.mark.parametrize(("width", "columns"), [(1, 64), (50, 4096), (150, 64)])  # the last in three parts
@pytest.mark.parametrize("most", [0, 100])
def test_equals_the_torch_form(width: int, columns: int, most: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "COLUMNS", columns)
    pages, tokens, kv, blocks = random_selection(width, tile, most, width + most)
    check_runs(runs.launch(pages, tokens, kv, blocks), readable_runs_torch(pages, tokens, kv, blocks))
    shared = pages[:1].expand(2, -1, -1)  # as a selector proposes that does not look at heads
    check_runs(runs.launch(shared, tokens, kv, blocks), readable_runs_torch(shared, tokens, kv, blocks))
