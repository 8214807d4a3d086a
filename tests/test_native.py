"""What compiled code for CPUs rests on: its threads, its roundings, and where it is not to be had."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import make_case
from mass_cases import SCALE, make_mass_case
from numba import carray

from gossamer.kernels import native
from gossamer.kernels.layout import NULL_PAGE, UNLIMITED, BlockRow, PagedKV, QueryBlocks
from gossamer.kernels.native.team import compiled, int64_at, job, run, take
from gossamer.kernels.paged_decode import paged_decode, paged_decode_torch
from gossamer.kernels.score_pages import page_mass, page_mass_torch
from gossamer.kvcache.host_memory import LARGE_PAGE, ask_for_large_pages

SQUARES = np.dtype([("next", "i8"), ("numbers", "i8"), ("count", "i8")])


def square(address):  # type: ignore[no-untyped-def]
    work = carray(address, 1)[0]
    numbers = carray(int64_at(work.numbers), work.count)
    while True:
        item = take(work.next)
        if item >= work.count:
            return
        numbers[item] *= item


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_share_what_is_left_to_do_and_do_each_thing_once(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numbers, taken = torch.arange(10_000), torch.zeros(1, dtype=torch.int64)
        run(compiled(SQUARES, square), job(SQUARES, next=taken, numbers=numbers, count=len(numbers)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(numbers, torch.arange(10_000) ** 2)
    assert int(taken) == len(numbers) + threads  # each found once that there is no more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    case = make_case([(700, 1), (90, 1)], tile=1, density=0.5, dtype=dtype)
    exact, lse = torch.zeros(case.q.shape), torch.zeros(case.q.shape[:2])
    rounded = torch.zeros(case.q.shape, dtype=dtype)
    for out in (exact, rounded):
        paged_decode(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale)
    assert torch.equal(rounded, exact.to(dtype)) and bool((exact != rounded.float()).any())


def test_scores_far_apart_and_far_from_zero() -> None:
    """As large as in models whose keys have channels of hundreds, where an exponential may overflow or vanish."""
    torch.manual_seed(0)
    q, k = 30 * torch.randn(1, 4, 64), 30 * torch.randn(1, 8, 64, 64)
    rule = torch.zeros(1, 1, dtype=torch.int32)
    kv = PagedKV(
        k, torch.randn_like(k), torch.arange(8, dtype=torch.int32)[None], torch.tensor([512], dtype=torch.int32),
        rule[0], rule, rule + UNLIMITED, 4,
    )  # fmt: skip
    blocks = QueryBlocks.of(1, [BlockRow(0, 0, 511, 1)])
    keys = kv.k.mean(2)
    torch.testing.assert_close(
        page_mass(q, kv, blocks, keys, scale=1.0), page_mass_torch(q, kv, blocks, keys, scale=1.0)
    )


def test_released_pages_do_not_count_whatever_lies_in_the_first_page() -> None:
    """A number that is none would be nothing to an exponential, so here the pages that nobody may read hold much."""
    case = make_mass_case(dim=64, released=True, tile=1)
    keys, given = case.table(64).nan_to_num(1e3), (case.q, case.kv, case.blocks)
    torch.testing.assert_close(page_mass(*given, keys, scale=SCALE), page_mass_torch(*given, keys, scale=SCALE))
    case.kv.table.fill_(NULL_PAGE)
    assert not page_mass(*given, keys, scale=SCALE).any()


def test_without_numba_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(700, 1)], tile=1, density=0.5)
    right, lse = case.blank()
    paged_decode_torch(case.q, case.kv, case.blocks, case.index, right, lse, scale=case.scale)
    native.compiles.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
    try:
        assert not native.compiles() and not native.reads(case.kv.k, 64)
        native.compile_all(torch.float32)
        out, _ = case.blank()
        paged_decode(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale)
    finally:
        native.compiles.cache_clear()
    assert torch.equal(out[case.blocks.rows[0].token], right[case.blocks.rows[0].token])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux says of a process's memory")
def test_large_pages_are_asked_for() -> None:
    table = torch.zeros(4 * LARGE_PAGE, dtype=torch.uint8)
    ask_for_large_pages(table)
    inside, advised = table.data_ptr() + 2 * LARGE_PAGE, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(end, 16) for end in words[0].split("-"))
        elif words[0] == "VmFlags:" and first <= inside < last:
            advised = "hg" in words
    assert advised and not table.any()
    ask_for_large_pages(table[:100])
    ask_for_large_pages(torch.empty(10, device="meta"))
