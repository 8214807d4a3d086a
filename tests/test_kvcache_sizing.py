"""From memory to pages."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import HeadGroup, group_heads
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent, Retention
from gossamer.kvcache.sizing import bytes_per_page, longest_sequence, size_pools

ALL = KeepAll()
STREAM = KeepSinkRecent(sink=64, recent=256)
PAGE = 64
HALF = group_heads([[ALL, STREAM]])
GIB = 2**30

rules = st.one_of(st.just(ALL), st.builds(KeepSinkRecent, sink=st.integers(0, 200), recent=st.integers(1, 1000)))


def cost(pages: tuple[int, ...], page_bytes: list[int]) -> int:
    return sum(a * b for a, b in zip(pages, page_bytes, strict=True))


def test_a_page_costs_what_the_pool_allocates() -> None:
    groups = group_heads([[ALL, STREAM, STREAM]] * 5)
    cache = KVCache(groups, [3, 2], ratio=1, head_dim=32, dtype=torch.bfloat16)
    expected = [bytes_per_page(group, 32, torch.bfloat16, {}) for group in groups]
    assert expected == [5 * 2 * 64 * 32 * 2, 10 * 2 * 64 * 32 * 2]
    assert [s.bytes_per_page for s in cache.stats()] == expected
    for pool, size in zip(cache.pools, expected, strict=True):
        assert pool.k.nbytes + pool.v.nbytes == pool.num_pages * size


def test_dense_memory_is_pages_times_their_size() -> None:
    sizing = size_pools(1000, [HeadGroup(((0, (0,)),))], [[ALL]], [3], 8, 1280, 128)
    assert (sizing.num_pages, sizing.token_capacity) == ((333,), 333 * PAGE)


def test_streaming_heads_leave_nearly_all_memory_to_the_others() -> None:
    sizing = size_pools(4 * GIB, HALF, [[ALL, STREAM]], [2**20] * 2, 16, 32768, 2048)
    dense = size_pools(4 * GIB, HALF, [[ALL, ALL]], [2**20] * 2, 16, 32768, 2048)
    assert dense.num_pages == (2048, 2048)
    assert sizing.token_capacity > 1.75 * dense.token_capacity
    # Sixteen sequences of 7 pages in decode, one step of prompts, and room for cached windows.
    assert 16 * 7 + 32 < sizing.num_pages[1] < 400


def test_every_operating_point_is_served() -> None:
    points = [[ALL, ALL], [ALL, STREAM]]
    assert size_pools(4 * GIB, HALF, points, [2**20] * 2, 16, 32768, 2048).num_pages == (2048, 2048)


def test_models_that_only_stream_report_what_their_sequences_hold() -> None:
    groups = group_heads([[STREAM]])
    sizing = size_pools(4 * GIB, groups, [[STREAM]], [2**20], 16, 32768, 2048)
    assert sizing.token_capacity == 16 * 32768
    assert cost(sizing.num_pages, [2**20]) <= 4 * GIB


@given(
    columns=st.lists(st.tuples(rules, rules, st.integers(1, 50)), min_size=1, max_size=3),
    memory=st.integers(1, 40_000),
    sequences=st.integers(1, 40),
    length=st.integers(1, 20_000),
    step=st.integers(1, 3000),
)
def test_what_fits_is_used_and_what_does_not_is_refused(
    columns: list[tuple[Retention, Retention, int]], memory: int, sequences: int, length: int, step: int
) -> None:
    groups = group_heads([list(range(len(columns)))])
    points = [[column[point] for column in columns] for point in range(2)]
    page_bytes = [size for _, _, size in columns]

    def alone(tokens: int) -> tuple[int, ...]:
        return tuple(max(rule.most_pages(tokens, step, PAGE) for rule in column[:2]) for column in columns)

    longest = longest_sequence(memory, points, page_bytes, length, step)
    assert longest == length or longest % PAGE == 0
    assert cost(alone(longest), page_bytes) <= memory
    if longest < length:
        assert cost(alone(min(length, longest + PAGE)), page_bytes) > memory
        with pytest.raises(ValueError, match=rf"One sequence of {length} tokens.*needs .* to {longest} tokens or less"):
            size_pools(memory, groups, points, page_bytes, sequences, length, step)
        return
    sizing = size_pools(memory, groups, points, page_bytes, sequences, length, step)
    assert cost(sizing.num_pages, page_bytes) <= memory
    assert all(have >= need for have, need in zip(sizing.num_pages, alone(length), strict=True))
    if any(ALL in column[:2] for column in columns):
        assert cost(sizing.num_pages, page_bytes) + 2 * sum(page_bytes) > memory
        assert sizing.token_capacity >= length
        keeps = [have for have, column in zip(sizing.num_pages, columns, strict=True) if ALL in column[:2]]
        assert sizing.token_capacity == min(keeps) * PAGE


@pytest.mark.parametrize("lengths", [[32768] * 3, [100] * 16, [5000, 64, 64, 20000]])
def test_sequences_within_the_capacity_run_together(lengths: list[int]) -> None:
    """Prompts in turn through the steps' chunks, then everyone decodes: nobody runs out of pages."""
    sizing = size_pools(2 * 1600, HALF, [[ALL, STREAM]], [1, 1], 16, 32768, 2048)
    assert sum(-(-length // PAGE) * PAGE for length in lengths) <= sizing.token_capacity
    cache = KVCache(HALF, sizing.num_pages, ratio=1, head_dim=1, dtype=torch.float32)
    tables = [cache.table((ALL, STREAM), b"%d" % number) for number in range(len(lengths))]
    for table, length in zip(tables, lengths, strict=True):
        prompt = max(1, length - 30)
        while table.length < prompt:
            cache.grow(table, min(2048, prompt - table.length))
            cache.trim(table)
    for _ in range(30):
        for table in tables:
            cache.grow(table, 1)
        for table in tables:
            cache.trim(table)
    cache.audit()


def test_the_refusal_is_one_sentence_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="needs") as caught:
        size_pools(300 * 2**20, HALF, [[ALL, STREAM]], [2**20] * 2, 16, 32768, 2048)
    message = str(caught.value)
    assert "32768 tokens" in message and "0.54 GiB" in message and "0.29 GiB" in message
    longest = int(re.findall(r"to (\d+) tokens or less", message)[0])
    assert longest == (300 - 38) * PAGE
    size_pools(300 * 2**20, HALF, [[ALL, STREAM]], [2**20] * 2, 16, longest, 2048)
