"""The Triton form of choose_count and choose_mass under Triton's interpreter. test_kernels_choose.py runs this file in
a process of its own, because TRITON_INTERPRET has to be set before Triton is imported."""

import os

import pytest
import torch
from test_kernels_choose import make_rows

from gossamer.kernels.choose import choose_count_torch, choose_mass_torch
from gossamer.kernels.triton import choose

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_choose.py runs this file"


@pytest.mark.parametrize(("width", "columns"), [(1, 64), (50, 4096), (300, 128)])  # 300 do not fit into registers
def test_equals_the_torch_form(width: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "COLUMNS", columns)
    mass = make_rows((5, width), seed=width)
    mass[0, 0] = 1e-45
    half = (mass > 0).sum(-1, dtype=torch.int32) // 2
    most = torch.tensor([-1, 0, 1, width, width + 1], dtype=torch.int32)
    for keep in (half, most):
        assert torch.equal(choose.launch_count(mass, keep), choose_count_torch(mass, keep))
    for share in (0.5, 0.999):
        assert torch.equal(choose.launch_mass(mass, share), choose_mass_torch(mass, share))


def test_views_and_nothing() -> None:
    mass = make_rows((10, 1, 2)).permute(2, 1, 0)
    keep = torch.tensor([3], dtype=torch.int32).expand(2, 1)
    assert torch.equal(choose.launch_count(mass, keep), choose_count_torch(mass, keep))
    assert torch.equal(choose.launch_mass(mass, 0.6), choose_mass_torch(mass, 0.6))
    assert choose.launch_mass(torch.empty(2, 0, 8), 0.5).shape == (2, 0, 8)
    assert choose.launch_count(torch.empty(2, 3, 0), torch.ones(2, 3, dtype=torch.int32)).shape == (2, 3, 0)


def test_a_share_that_is_met_exactly_takes_no_more() -> None:
    mass = torch.tensor([[0.25, 0.5, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0]])
    assert choose.launch_mass(mass, 0.5).tolist() == [[False, True, False, False], [False] * 4]
