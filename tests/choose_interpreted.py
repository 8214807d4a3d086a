"""The Triton forms of choose_pages and choose_tokens under Triton's interpreter. test_kernels_choose.py runs this file
in a process of its own, because TRITON_INTERPRET has to be set before Triton is imported."""

import itertools
import os

import pytest
import torch
from test_kernels_choose import BUDGETS, make_pages, make_rows

from gossamer.kernels.choose import choose_pages_torch, choose_tokens_torch
from gossamer.kernels.triton import choose

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_choose.py runs this file"

WIDTHS = pytest.mark.parametrize(("width", "columns"), [(1, 64), (50, 8192), (150, 64)])  # the last in three parts


@WIDTHS
def test_tokens(width: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "TOKENS", columns)
    mass = make_rows((5, width), seed=width)
    mass[0, 0] = 1e-45
    mass[1] = mass[1].clamp(max=0.5)  # more equal entries than are kept
    for most, share in itertools.product({width // 3, width + 5} - {0}, (0.0, 0.5, 0.999, 1.0)):
        found = choose.launch_tokens(mass, most, share)
        assert torch.equal(found, choose_tokens_torch(mass, most, share)), (most, share)
    assert choose.launch_tokens(mass, 0, 1.0).shape == (5, 0)


@pytest.mark.parametrize(("width", "columns", "size"), [(1, 64, 1), (50, 4096, 24), (150, 64, 1)])
def test_pages(width: int, columns: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "PAGES", columns)
    mass, kv, blocks = make_pages(width, size, seed=1)
    some = [*range(0, len(blocks), 4), len(blocks) - 1]
    mass, blocks = mass[:, some], blocks.take(some)
    for n, (kind, value) in enumerate(BUDGETS):
        least, recent = ((0, 0), (9, 16))[n % 2]
        given = {"kind": kind, "value": value, "least": least, "recent": recent}
        mine = choose.launch_pages(mass, kv, blocks, **given)
        assert torch.equal(mine, choose_pages_torch(mass, kv, blocks, **given)), given


def test_values_that_differ_in_their_last_bits() -> None:
    """Neighbouring floats, and floats that differ in one byte alone: every byte has to be looked at."""
    bits = torch.tensor([0x3F800000 + i * step for step in (1, 1 << 8, 1 << 16) for i in range(60)], dtype=torch.int32)
    mass = bits[torch.randperm(180, generator=torch.Generator().manual_seed(5))].view(torch.float32).repeat(4, 1)
    for most in (1, 2, 59, 60, 61, 119, 120, 121, 179):
        assert torch.equal(choose.launch_tokens(mass, most, 1.0), choose_tokens_torch(mass, most, 1.0))


def test_views_and_nothing() -> None:
    mass = make_rows((10, 1, 2)).permute(2, 1, 0)
    assert torch.equal(choose.launch_tokens(mass, 3, 0.6), choose_tokens_torch(mass, 3, 0.6))
    assert choose.launch_tokens(torch.empty(2, 0, 8), 3, 0.5).shape == (2, 0, 3)
    assert choose.launch_tokens(torch.empty(2, 3, 0), 3, 0.5).shape == (2, 3, 0)


def test_a_share_that_is_met_exactly_takes_no_more() -> None:
    mass = torch.tensor([[0.25, 0.5, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert choose.launch_tokens(mass, 3, 0.5).tolist() == [[1, -1, -1], [-1] * 3, [0, 1, -1]]
