"""Prefix reuse: keys, the search for a reuse point, what a hit takes, and what eviction leaves."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.kernels.layout import NULL_PAGE
from gossamer.kvcache.cache import KVCache, PageTable
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.prefix import HashChain, PrefixIndex, reusable_pages
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent, Retention

PAGE = 4
ALL = KeepAll()
STREAM = KeepSinkRecent(sink=4, recent=6)
GROUPS = group_heads([[ALL, STREAM], [STREAM, ALL]])
BOTH = (ALL, STREAM)

rules = st.one_of(st.just(ALL), st.builds(KeepSinkRecent, sink=st.integers(0, 11), recent=st.integers(1, 17)))


def make_cache(*num_pages: int) -> KVCache:
    return KVCache(GROUPS, num_pages or (40, 40), ratio=1, head_dim=2, dtype=torch.float32, page_size=PAGE)


def compute(
    cache: KVCache, tokens: Sequence[int], *, rules: tuple[Retention, ...] = BOTH, salt: bytes = b"", step: int = 8
) -> PageTable:
    """Compute a whole prompt, a prefix hit first. What is stored at a position tells of every token up to it."""
    table = cache.table(rules, salt)
    cache.attach(table, tokens, len(tokens) - 1)
    while table.length < len(tokens):
        first = table.length
        cache.grow(table, min(step, len(tokens) - first))
        write(cache, table, tokens, first)
        cache.seal(table, tokens)
        cache.trim(table)
        cache.audit()
    return table


def content(tokens: Sequence[int], position: int) -> float:
    return float(np.random.default_rng(list(tokens[: position + 1])).integers(2**20))


def write(cache: KVCache, table: PageTable, tokens: Sequence[int], first: int) -> None:
    views = cache.views([table])
    for kv in (*views.layer(0), *views.layer(1)):
        for position in range(first, table.length):
            page = int(kv.table[0, position // PAGE])
            kv.k[:, page, position % PAGE] = content(tokens, position) + kv.heads[:, None]
            kv.v[:, page, position % PAGE] = -content(tokens, position) - kv.heads[:, None]


def check(cache: KVCache, table: PageTable, tokens: Sequence[int]) -> None:
    """Every position that the next query may see holds what was computed for these tokens."""
    views = cache.views([table])
    for kv in (*views.layer(0), *views.layer(1)):
        for position in range(table.length):
            if position > table.length - kv.window[0, 0] or position < kv.sink[0, 0]:
                page = int(kv.table[0, position // PAGE])
                assert page != NULL_PAGE
                expected = content(tokens, position) + kv.heads[:, None].expand(-1, 2)
                assert torch.equal(kv.k[:, page, position % PAGE], expected)
                assert torch.equal(kv.v[:, page, position % PAGE], -expected)


def test_keys_are_a_salted_sha256_chain() -> None:
    chain = HashChain(b"salt and pepper", 2)
    seed = hashlib.sha256(b"salt" + b"salt and pepper").digest()
    first = hashlib.sha256(b"page" + seed + np.array([7, 300_000], "<i4").tobytes()).digest()
    second = hashlib.sha256(b"page" + first + np.array([0, 1], "<i4").tobytes()).digest()
    assert chain.extend([7, 300_000, 0, 1, 9], 2) == [first, second]


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=80),
    cuts=st.lists(st.integers(0, 20), max_size=5),
    kind=st.sampled_from([list, tuple, np.array]),
)
def test_a_chain_computed_in_parts_is_the_chain(tokens: list[int], cuts: list[int], kind: type) -> None:
    whole, parts = HashChain(b"", PAGE), HashChain(b"", PAGE)
    pages = len(tokens) // PAGE
    for cut in sorted(cuts):
        # Tokens of pages that are known are not looked at again.
        known = min(len(parts.keys), pages)
        parts.extend(kind([0] * known * PAGE + tokens[known * PAGE :]), min(cut, pages))
    assert parts.extend(kind(tokens), pages) == whole.extend(tokens, pages)


def test_a_long_chain_is_hashed_only_as_far_as_it_is_found() -> None:
    tokens = range(100_000)
    chain, index = HashChain(b"", PAGE), PrefixIndex()
    for page, key in enumerate(HashChain(b"", PAGE).extend(tokens, 10)):
        index.enter(key, page)
    assert reusable_pages(chain, tokens, len(tokens), [index, index], [ALL, STREAM], PAGE) == 10
    assert len(chain.keys) < 1000


@settings(max_examples=300)
@given(
    groups=st.lists(st.tuples(rules, st.sets(st.integers(0, 13), max_size=3)), min_size=1, max_size=3),
    limit=st.integers(4 * PAGE, 14 * PAGE),
)
def test_the_reuse_point_is_the_longest_that_every_rule_allows(
    groups: list[tuple[Retention, set[int]]], limit: int
) -> None:
    """Groups with some pages missing."""
    tokens = list(range(14 * PAGE))
    keys = HashChain(b"", PAGE).extend(tokens, 14)
    indexes = []
    for _, missing in groups:
        index = PrefixIndex()
        for page in range(14):
            if page not in missing:
                index.enter(keys[page], page)
        indexes.append(index)

    def possible(pages: int) -> bool:
        """Every key that the first new query sees is there."""
        query = pages * PAGE
        return all(
            key // PAGE not in missing
            for rule, missing in groups
            for key in range(query)
            if key > query - rule.window or key < rule.sink
        )

    longest = max(pages for pages in range(limit // PAGE + 1) if possible(pages))
    found = reusable_pages(HashChain(b"", PAGE), tokens, limit, indexes, [rule for rule, _ in groups], PAGE)
    assert found == longest


def test_the_search_looks_at_no_page_twice() -> None:
    class CountingIndex(PrefixIndex):
        lookups = 0

        def find(self, key: bytes) -> int:
            self.lookups += 1
            return super().find(key)

    pages = 4096
    tokens = np.arange(pages * PAGE)
    keys = HashChain(b"", PAGE).extend(tokens, pages)
    rule = KeepSinkRecent(sink=0, recent=1000 * PAGE)
    indexes = [CountingIndex(), CountingIndex()]
    for page, key in enumerate(keys):
        # Holes in turn, so that each group throws the other's window away again and again.
        if page % 7:
            indexes[0].enter(key, page)
        if page % 5:
            indexes[1].enter(key, page)
    assert reusable_pages(HashChain(b"", PAGE), tokens, len(tokens), indexes, [rule, rule], PAGE) == 0
    assert all(index.lookups <= 2 * pages for index in indexes)


def test_a_hit_takes_what_the_rules_keep_and_leaves_the_rest() -> None:
    cache, tokens = make_cache(), list(range(100, 141))
    first = compute(cache, tokens)
    check(cache, first, tokens)
    second = cache.table(BOTH, b"")
    assert cache.attach(second, tokens, 40) == second.length == 40
    cache.audit()
    kept, streamed = second.pages
    assert kept == first.pages[0][:10]
    # The query at 40 sees 0..3 and 35..40.
    assert [page != NULL_PAGE for page in streamed] == [True] + [False] * 7 + [True] * 2
    check(cache, second, tokens)
    assert (cache.queried_tokens, cache.hit_tokens) == (41 + 41, 40)


@pytest.mark.parametrize("limit", range(41))
def test_a_streaming_hit_is_right_at_every_length(limit: int) -> None:
    """Pages released in the middle are still there for a prompt that leaves the first one early."""
    cache, tokens = make_cache(), list(range(41))
    cache.drop(compute(cache, tokens))
    table = cache.table(BOTH, b"")
    assert cache.attach(table, tokens, limit) == limit // PAGE * PAGE
    cache.audit()
    check(cache, table, tokens)


def test_a_hit_stops_where_the_tokens_differ() -> None:
    cache, tokens = make_cache(), list(range(40))
    cache.drop(compute(cache, tokens))
    other = [*tokens[:21], 999, *tokens[22:]]
    table = compute(cache, other)
    assert cache.hit_tokens == 20
    check(cache, table, other)
    check(cache, compute(cache, tokens), tokens)


def test_different_salts_never_share() -> None:
    cache, tokens = make_cache(), list(range(40))
    tables = [compute(cache, tokens, salt=salt) for salt in (b"", b"a", b"b")]
    assert cache.hit_tokens == 0
    for group in range(2):
        owned = [page for table in tables for page in table.pages[group] if page != NULL_PAGE]
        assert len(set(owned)) == len(owned)
    assert compute(cache, tokens, salt=b"a").pages[0][:9] == tables[1].pages[0][:9]
    # A salt made of another chain's key and tokens is not that chain.
    chain = HashChain(b"", PAGE)
    forged = chain.extend(tokens, 1)[0] + np.array(tokens[4:8], "<i4").tobytes()
    assert HashChain(forged, PAGE).extend(tokens[8:], 1)[0] not in chain.extend(tokens, 10)


def test_a_hit_needs_the_window_before_the_reuse_point() -> None:
    cache, tokens = make_cache(40, 12), list(range(40))
    cache.drop(compute(cache, tokens))
    cache.grow(cache.table((ALL, ALL), b"stranger"), 7 * PAGE)  # evicts what the streaming heads released first
    keys = HashChain(b"", PAGE).extend(tokens, 10)
    present = [page for page, key in enumerate(keys) if cache.pools[1].index.find(key) != NULL_PAGE]
    assert present == [0, 6, 7, 8, 9]
    # The query at 32 sees 27 ... 32 and begins in page 6; the one at 28 sees page 5, and the one at 4 only the sink.
    for limit, hit in ((40, 40), (39, 36), (35, 32), (31, 4), (3, 0)):
        table = cache.table(BOTH, b"")
        assert cache.attach(table, tokens, limit) == hit
        check(cache, table, tokens)
        cache.drop(table)


def test_the_first_of_two_equal_pages_is_found() -> None:
    cache, tokens = make_cache(), list(range(17))
    tables = [cache.table(BOTH, b"") for _ in range(2)]
    for table in tables:
        assert cache.attach(table, tokens, 16) == 0
        cache.grow(table, 16)
        write(cache, table, tokens, 0)
    for table in tables:
        cache.seal(table, tokens)
        cache.audit()
    assert not set(tables[0].pages[0]) & set(tables[1].pages[0])
    third = compute(cache, tokens)
    assert third.pages[0][:4] == tables[0].pages[0]
    cache.drop(tables[1])  # nobody can find its pages, so they are free at once
    cache.audit()
    assert [pool.num_cached for pool in cache.pools] == [0, 0]
    check(cache, third, tokens)


def test_the_deepest_page_of_a_dropped_prefix_is_evicted_first() -> None:
    cache, tokens = make_cache(10, 10), list(range(40))
    cache.drop(compute(cache, tokens))
    stranger = cache.table((ALL, ALL), b"stranger")
    for left in (9, 8, 7):
        cache.grow(stranger, PAGE)
        probe = cache.table((ALL, ALL), b"")
        probe_hit = reusable_pages(probe.chain, tokens, 40, [cache.pools[0].index], [ALL], PAGE)
        assert probe_hit == left
        cache.audit()


def test_the_prefix_used_last_is_evicted_last() -> None:
    cache = make_cache(20, 20)
    old, new = list(range(20)), list(range(100, 120))
    rules = (ALL, ALL)
    cache.drop(compute(cache, old, rules=rules))
    cache.drop(compute(cache, new, rules=rules))
    again = cache.table(rules, b"")
    assert cache.attach(again, old, 20) == 20
    cache.drop(again)  # a hit is a use
    stranger = cache.table(rules, b"stranger")
    cache.grow(stranger, 15 * PAGE)
    assert cache.attach(cache.table(rules, b""), new, 20) == 0
    assert cache.attach(again, old, 20) == 20
    check(cache, again, old)


def test_owned_pages_are_never_evicted() -> None:
    cache, tokens = make_cache(10, 10), list(range(20))
    first = compute(cache, tokens, rules=(ALL, ALL))
    second = compute(cache, [*tokens, 1], rules=(ALL, ALL))
    cache.drop(first)
    greedy = cache.table((ALL, ALL), b"greedy")
    assert cache.can_grow(greedy, 4 * PAGE) and not cache.can_grow(greedy, 4 * PAGE + 1)
    cache.grow(greedy, 4 * PAGE)
    cache.audit()
    check(cache, second, [*tokens, 1])


def test_a_preempted_sequence_comes_back_through_its_own_pages() -> None:
    cache, tokens = make_cache(), list(range(30))
    table = compute(cache, tokens)
    keys = list(table.chain.keys)
    cache.grow(table, 1)  # given up in the middle of a step
    cache.drop(table)
    cache.audit()
    assert cache.attach(table, [*tokens, 5], 30) == 28
    assert table.chain.keys == keys  # not hashed again
    check(cache, table, tokens)


def test_clearing_forgets_every_prefix_and_spares_running_sequences() -> None:
    cache, tokens = make_cache(), list(range(40))
    running = compute(cache, tokens)
    cache.drop(compute(cache, list(range(50, 70))))
    cache.clear_prefixes()
    cache.audit()
    assert [pool.num_cached for pool in cache.pools] == [0, 0]
    assert cache.attach(cache.table(BOTH, b""), tokens, 39) == 0
    check(cache, running, tokens)
    cache.drop(running)
    assert [pool.num_free for pool in cache.pools] == [40, 40]


def test_shared_pages_are_not_written_by_sequences_that_go_on() -> None:
    cache, tokens = make_cache(), list(range(24))
    first = compute(cache, tokens)
    branches = [[*tokens, 100 + branch, *range(200, 210)] for branch in range(3)]
    tables = [compute(cache, branch) for branch in branches]
    check(cache, first, tokens)
    for table, branch in zip(tables, branches, strict=True):
        assert table.pages[0][:6] == first.pages[0]
        check(cache, table, branch)


def test_pages_released_before_they_were_sealed_are_not_found() -> None:
    cache, tokens = make_cache(), list(range(24))
    table = cache.table(BOTH, b"")
    cache.grow(table, 24)
    cache.trim(table)
    cache.seal(table, tokens)
    cache.audit()
    assert [len(pool.index) for pool in cache.pools] == [6, 3]
    assert cache.attach(cache.table(BOTH, b""), tokens, 23) == 4
