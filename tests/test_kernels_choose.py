"""What is chosen of scores: against sorting in Python, and the compiled forms against the torch form."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import run_interpreted
from torch import Tensor

from gossamer.kernels.choose import (
    Kind,
    choose_count,
    choose_mass,
    choose_pages,
    choose_pages_torch,
    choose_tokens,
    choose_tokens_torch,
)
from gossamer.kernels.layout import NULL_PAGE, BlockRow, PagedKV, QueryBlocks
from gossamer.kernels.native.choose import LONG, SAMPLED

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
    for choose in (choose_tokens, choose_tokens_torch):
        tokens = choose(torch.tensor(rows), most, share)
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
        for choose in (choose_tokens, choose_tokens_torch):
            tokens = choose(mass, 20, share)
            assert tokens.shape == (*shape[:-1], min(20, shape[-1]))
            assert tokens.view(-1, tokens.shape[-1]).tolist() == [expected_tokens(row, 20, share) for row in flat]


@pytest.mark.parametrize("most", [1, 300, 2000, 5000])
def test_rows_that_are_sampled_first(most: int) -> None:
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
    assert torch.equal(tokens, choose_tokens_torch(mass, most, 1.0))
    for share in (0.01, 0.5, 0.9):
        assert torch.equal(choose_tokens(mass, most, share), choose_tokens_torch(mass, most, share))


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


SIZE = 4  # tokens of a page
BUDGETS: tuple[tuple[Kind, float], ...] = (
    *(("tokens", 1), ("tokens", 21), ("tokens", 1e6), ("share", 0.01), ("share", 0.3), ("share", 1.0)),
    *(("mass", 1e-9), ("mass", 0.7), ("mass", 1.0), ("part", 0.2), ("part", 1.0), ("weight", 1e-6), ("weight", 0.1)),
)


def make_pages(width: int, size: int, *, seed: int = 0) -> tuple[Tensor, PagedKV, QueryBlocks]:
    """Masses of past pages for blocks of `size` queries anywhere in three sequences, some of whose pages are gone."""
    gen = torch.Generator().manual_seed(seed)
    table = torch.arange(3 * width, dtype=torch.int32).view(3, width)
    table[1, 1 : max(1, width // 2)] = NULL_PAGE
    table[2, torch.rand(width, generator=gen) < 0.3] = NULL_PAGE
    ends = (width * SIZE, max(1, width * SIZE - 5), width * SIZE * 2 // 3 + 1)
    rows = []
    for seq, end in enumerate(ends):
        for pos in {0, min(size // 2, end - 1), end // 3, (end - 1) // size * size, end - 1}:
            rows.append(BlockRow(seq, len(rows) * size, pos, min(pos // size * size + size, end) - pos))
    blocks = QueryBlocks.of(size, [*rows, BlockRow(0, 0, 0, 0)])  # the last as a recorded step pads itself
    pool, rule = torch.zeros(2, 1, SIZE, 1), torch.zeros(3, 2, dtype=torch.int32)
    kv = PagedKV(pool, pool, table, rule[:, 0], rule[0], rule, rule, 1)
    past = torch.arange(width) < (blocks.origin // SIZE)[:, None]
    mass = make_rows((2, len(blocks), width), seed=seed) * (past & (table[blocks.seq.long()] != NULL_PAGE))
    return mass / mass.sum(-1, keepdim=True).clamp(min=1e-30), kv, blocks


def expected_pages(
    row: list[float], table: list[int], at: BlockRow, size: int, kind: Kind, value: float, least: int, recent: int
) -> list[bool]:
    first, seen = at.pos // size * size // SIZE, (at.pos + at.count - 1) // SIZE + 1
    past = [page < first and table[page] != NULL_PAGE for page in range(len(row))]
    near = [past[page] and page >= first - -(-recent // SIZE) for page in range(len(row))]

    def largest(pages: int) -> list[bool]:
        ranked = sorted(
            (page for page in range(len(row)) if past[page]),
            key=lambda page: (page > 0, not near[page], -row[page], page),
        )
        chosen = set(ranked[: max(0, pages - (seen - first))])
        return [page in chosen for page in range(len(row))]

    floor = torch.tensor(value, dtype=torch.float32)
    if kind == "tokens":
        found = largest(math.ceil(value / SIZE))
    elif kind == "share":
        found = largest(math.ceil(float(floor * seen)))
    elif kind == "mass":
        found = expected_mass(row, value)
    else:
        least_mass = float(floor * max(row)) if kind == "part" else float(floor)
        found = [mass > 0 and mass >= least_mass for mass in row]
    if least:
        found = [one or other for one, other in zip(found, largest(math.ceil(least / SIZE)), strict=True)]
    return [one or other for one, other in zip(found, near, strict=True)] if recent else found


@pytest.mark.parametrize("size", [1, 6, 32])
@pytest.mark.parametrize("width", [1, 7, 60])
def test_choose_pages(width: int, size: int) -> None:
    mass, kv, blocks = make_pages(width, size)
    for (kind, value), (least, recent) in itertools.product(BUDGETS, [(0, 0), (17, 0), (0, 5), (9, 16)]):
        options = {"kind": kind, "value": value, "least": least, "recent": recent}
        found = choose_pages(mass, kv, blocks, **options)
        assert found.dtype == torch.bool and found.shape == mass.shape
        assert torch.equal(found, choose_pages_torch(mass, kv, blocks, **options))
        for g, n in itertools.product(range(2), range(len(blocks))):
            row, table = mass[g, n].tolist(), kv.table[blocks.rows[n].seq].tolist()
            right = expected_pages(row, table, blocks.rows[n], size, kind, value, least, recent)
            assert found[g, n].tolist() == right, (kind, value, least, recent, blocks.rows[n])


def test_triton_under_the_interpreter() -> None:
    run_interpreted("choose_interpreted.py")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 63, 1000, 2048, 16384, 20001])
def test_on_a_gpu(width: int) -> None:
    mass = make_rows((4, 10, width), seed=3)
    for share in SHARES:
        assert torch.equal(choose_tokens(mass.cuda(), 100, share).cpu(), choose_tokens_torch(mass, 100, share))
    halves = mass[:, ::2].cuda()  # not contiguous
    assert torch.equal(choose_tokens(halves, 70, 0.8).cpu(), choose_tokens_torch(mass[:, ::2], 70, 0.8))
    for size in (1, 32):
        given = make_pages(width, size)
        there = given[0].cuda(), on_gpu(given[1]), QueryBlocks.of(size, given[2].rows, "cuda")
        for (kind, value), (least, recent) in itertools.product(BUDGETS, [(0, 0), (9, 16)]):
            options = {"kind": kind, "value": value, "least": least, "recent": recent}
            assert torch.equal(choose_pages(*there, **options).cpu(), choose_pages_torch(*given, **options))


def on_gpu(kv: PagedKV) -> PagedKV:
    tensors = (kv.k, kv.v, kv.table, kv.length, kv.heads, kv.sink, kv.window)
    return PagedKV(*(each.cuda() for each in tensors), kv.ratio)
