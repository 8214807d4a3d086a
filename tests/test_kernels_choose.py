"""choose_count, choose_mass, choose_tokens: against sorting in Python, and the Triton form against the torch form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import run_interpreted
from torch import Tensor

from gossamer.kernels.choose import (
    LONG,
    SAMPLED,
    choose_count,
    choose_count_torch,
    choose_mass,
    choose_mass_torch,
    choose_tokens,
)

SHARES = (0.0, 1e-9, 0.3, 0.5, 0.9, 0.999, 1.0)


def by_rank(row: list[float]) -> list[int]:
    """Positions of what is > 0, the largest first, of equal entries the lower position first."""
    return sorted((i for i, x in enumerate(row) if x > 0), key=lambda i: (-row[i], i))


def enough(row: list[float], share: float) -> int:
    """How many of the largest entries it takes to hold `share` of the row."""
    ranked, goal, taken = by_rank(row), share * math.fsum(row), 0
    while taken < len(ranked) and (share == 1 or math.fsum(row[i] for i in ranked[:taken]) < goal):
        taken += 1
    return taken


def expected_count(row: list[float], keep: int) -> list[bool]:
    chosen = set(by_rank(row)[: max(keep, 0)])
    return [i in chosen for i in range(len(row))]


def expected_mass(row: list[float], share: float) -> list[bool]:
    ranked, taken = by_rank(row), enough(row, share)
    return [taken > 0 and x >= row[ranked[taken - 1]] for x in row]


def expected_tokens(row: list[float], most: int, share: float) -> list[int]:
    chosen = sorted(by_rank(row)[: min(most, enough(row, share))])
    return chosen + [-1] * (min(most, len(row)) - len(chosen))


def make_rows(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Rows as scores make them, some with many equal entries, some mostly or wholly 0, values far apart."""
    gen = torch.Generator().manual_seed(seed)
    flat = torch.rand(shape, generator=gen).view(-1, shape[-1])
    for i, row in enumerate(flat):
        if i % 5 == 1:
            row.copy_((row * 4).round() / 4)
        if i % 5 == 2:
            row.pow_(40)
        if i % 5 == 3:
            row[torch.rand(row.shape, generator=gen) < 0.8] = 0
        if i % 5 == 4:
            row.zero_()
    return flat.view(shape)


# Entries that are often equal and often 0, and whose sums are exact: then every order of the terms gives the same.
entries = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 1 << 20).map(lambda x: x / (1 << 20)))
calls = st.integers(1, 30).flatmap(
    lambda width: st.lists(st.lists(entries, min_size=width, max_size=width), min_size=1, max_size=4)
)
shares = st.one_of(st.sampled_from(SHARES), st.floats(0, 1))


@given(calls, st.data())
def test_choose_count(rows: list[list[float]], data: st.DataObject) -> None:
    keep = [data.draw(st.integers(-1, len(row) + 2)) for row in rows]
    mask = choose_count(torch.tensor(rows), torch.tensor(keep, dtype=torch.int32))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [expected_count(row, k) for row, k in zip(rows, keep, strict=True)]


@given(calls, shares)
def test_choose_mass(rows: list[list[float]], share: float) -> None:
    mask = choose_mass(torch.tensor(rows), share)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [expected_mass(row, share) for row in rows]


@given(calls, st.integers(0, 32), shares)
def test_choose_tokens(rows: list[list[float]], most: int, share: float) -> None:
    tokens = choose_tokens(torch.tensor(rows), most, share)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [expected_tokens(row, most, share) for row in rows]


@given(calls, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_no_less(rows: list[list[float]], one: float, other: float) -> None:
    less, more = (choose_mass(torch.tensor(rows), share) for share in sorted((one, other)))
    assert bool((less <= more).all())


@given(calls, st.integers(0, 30))
def test_the_chosen_are_never_smaller_than_the_others(rows: list[list[float]], keep: int) -> None:
    mass = torch.tensor(rows)
    mask = choose_count(mass, torch.tensor(keep, dtype=torch.int32))
    assert mask.sum(-1).tolist() == [min(keep, sum(x > 0 for x in row)) for row in mass.tolist()]
    least = mass.masked_fill(~mask, 2).amin(-1)
    assert bool((mass.masked_fill(mask, 0).amax(-1) <= least).all())


@pytest.mark.parametrize("shape", [(2, 5, 200), (10, 1), (3, 4, 1, 33)])
def test_long_rows_and_any_number_of_dimensions(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.kernels.choose.PIECE", 3 * shape[-1])  # rows are taken three at a time
    mass = make_rows(shape)
    flat = mass.view(-1, shape[-1]).tolist()
    keep = torch.randint(0, shape[-1] + 1, shape[:-1], dtype=torch.int32)
    found = choose_count(mass, keep)
    assert found.shape == mass.shape
    limits = keep.flatten().tolist()
    assert found.view(-1, shape[-1]).tolist() == [expected_count(*each) for each in zip(flat, limits, strict=True)]
    for share in SHARES:
        found = choose_mass(mass, share)
        assert found.shape == mass.shape
        assert found.view(-1, shape[-1]).tolist() == [expected_mass(row, share) for row in flat]
        tokens = choose_tokens(mass, 20, share)
        assert tokens.shape == (*shape[:-1], min(20, shape[-1]))
        assert tokens.view(-1, tokens.shape[-1]).tolist() == [expected_tokens(row, 20, share) for row in flat]


@pytest.mark.parametrize("most", [1, 300, 2000, 5000])
def test_rows_that_are_sampled_first(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them so that the sample misleads: what is large is seen by it alone, or not at all."""
    width, gen = LONG + 7, torch.Generator().manual_seed(2)
    mass = make_rows((7, width), seed=1)
    for row, scale in ((0, 1.0), (5, 0.01), (6, 0.01)):
        mass[row] = (1 + torch.randperm(width, generator=gen)) * (scale / width)  # no two are equal
    seen = torch.arange(width) % SAMPLED == 0
    mass[5, seen] += 1
    mass[6, ~seen] += 1
    tokens = choose_tokens(mass, most, 1.0)
    assert tokens.tolist() == [expected_tokens(row, most, 1.0) for row in mass.tolist()]
    if most < LONG:  # rows without equal entries, and with enough above 0, need nothing else
        monkeypatch.setattr("gossamer.kernels.choose.choose_count_torch", None)
        assert torch.equal(choose_tokens(mass[[0, 5, 6]], most, 1.0), tokens[[0, 5, 6]])


def test_a_budget_for_each_column_of_rows_and_views() -> None:
    mass = make_rows((40, 5, 2)).permute(2, 1, 0)  # [2, 5, 40], not contiguous
    keep = torch.tensor([0, 1, 7, 39, 100], dtype=torch.int32)
    assert torch.equal(choose_count(mass, keep), choose_count(mass.contiguous(), keep.expand(2, 5).contiguous()))
    assert torch.equal(choose_mass(mass, 0.7), choose_mass(mass.contiguous(), 0.7))
    assert torch.equal(choose_tokens(mass, 9, 0.7), choose_tokens(mass.contiguous(), 9, 0.7))


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 8), (2, 0, 8)])
def test_nothing_to_choose_from(shape: tuple[int, ...]) -> None:
    mass = torch.empty(shape)
    assert choose_count(mass, torch.ones(shape[:-1], dtype=torch.int32)).shape == shape
    assert choose_mass(mass, 0.5).shape == choose_mass(mass, 1.0).shape == shape
    assert choose_tokens(mass, 4, 0.5).shape == (*shape[:-1], min(4, shape[-1]))


def test_the_smallest_floats_count_as_any_other() -> None:
    mass = torch.tensor([[1.0, 1e-45, 0.0, 1e-30]])
    assert choose_count(mass, torch.tensor([3], dtype=torch.int32)).tolist() == [[True, True, False, True]]
    assert choose_mass(mass[:, 1:3], 0.5).tolist() == [[True, False]]
    # Their part of the sum is lost in rounding, and yet share 1 keeps them.
    assert choose_mass(mass, 1.0).tolist() == [[True, True, False, True]]
    assert choose_tokens(mass, 4, 1.0).tolist() == [[0, 1, 3, -1]]


def test_triton_under_the_interpreter() -> None:
    run_interpreted("choose_interpreted.py")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 63, 1000, 2048, 16384, 20001])
def test_on_a_gpu(width: int) -> None:
    mass = make_rows((4, 10, width), seed=3)
    keep = torch.randint(-1, width + 2, (4, 10), dtype=torch.int32)
    assert torch.equal(choose_count(mass.cuda(), keep.cuda()).cpu(), choose_count_torch(mass, keep))
    for share in SHARES:
        mask = choose_mass(mass.cuda(), share).cpu()
        assert torch.equal(mask, choose_mass(mass, share))
        assert torch.equal(choose_tokens(mass.cuda(), 100, share).cpu(), choose_tokens(mass, 100, share))
    halves = mass[:, ::2].cuda()  # not contiguous
    assert torch.equal(choose_mass(halves, 0.8).cpu(), choose_mass_torch(mass[:, ::2], 0.8))
