"""The Triton form of choose_count and choose_mass under Triton's interpreter. test_kernels_choose.py runs this file in
a process of its own, because TRITON_INTERPRET has to be set before Triton is imported."""

import os

import pytest
import torch
from test_kernels_choose import make_rows

from gossamer.kernels.choose import choose_count_torch, choose_mass_torch, choose_tokens
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


@pytest.mark.parametrize(("width", "columns"), [(1, 64), (50, 4096), (300, 128)])
def test_positions(width: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "COLUMNS", columns)
    mass = make_rows((5, width), seed=width)
    mass[1] = mass[1].clamp(max=0.5)  # more equal entries than are kept
    for most in {1, width // 3, width} - {0}:
        assert torch.equal(choose.launch_positions(mass, most), choose_tokens(mass, most, 1.0))
    assert choose.launch_positions(mass, 0).shape == (5, 0)


def test_values_that_differ_in_their_last_bits() -> None:
    """Neighbouring floats, and floats that differ in one byte alone: every byte has to be looked at."""
    bits = torch.tensor([0x3F800000 + i * step for step in (1, 1 << 8, 1 << 16) for i in range(60)], dtype=torch.int32)
    mass = bits[torch.randperm(180, generator=torch.Generator().manual_seed(5))].view(torch.float32).repeat(180, 1)
    keep = torch.arange(180, dtype=torch.int32)
    assert torch.equal(choose.launch_count(mass, keep), choose_count_torch(mass, keep))


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
