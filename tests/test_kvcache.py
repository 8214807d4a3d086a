"""Retention rules, groups of heads, page pools and page tables, one fact at a time."""

import gc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.kernels.layout import NULL_PAGE, UNLIMITED
from gossamer.kvcache.cache import KVCache, OutOfPages, PageTable
from gossamer.kvcache.groups import HeadGroup, group_heads
from gossamer.kvcache.pool import PagePool
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent, Retention

PAGE = 4
ALL = KeepAll()
STREAM = KeepSinkRecent(sink=4, recent=6)
TWO_GROUPS = group_heads([[ALL, STREAM], [STREAM, ALL]])

rules = st.one_of(st.just(ALL), st.builds(KeepSinkRecent, sink=st.integers(0, 11), recent=st.integers(1, 17)))


def make_cache(num_pages: tuple[int, ...] = (20, 20), **changes: object) -> KVCache:
    options: dict = {"ratio": 2, "head_dim": 2, "dtype": torch.float32, "page_size": PAGE} | changes
    return KVCache(TWO_GROUPS, num_pages, **options)


def make_pool(num_pages: int) -> PagePool:
    return PagePool(1, num_pages, page_size=PAGE, head_dim=2, dtype=torch.float32, device="cpu")


def advance(cache: KVCache, table: PageTable, num_tokens: int) -> None:
    """One step without a model: the sequence's tokens are their positions."""
    cache.grow(table, num_tokens)
    cache.seal(table, range(table.length))
    cache.trim(table)
    cache.audit()


def sees(rule: Retention, query: int, key: int) -> bool:
    """PagedKV's rule, spelt out."""
    return key <= query and (key > query - rule.window or key < rule.sink)


@given(rule=rules, length=st.integers(0, 60))
def test_a_page_is_released_when_no_later_query_sees_it(rule: Retention, length: int) -> None:
    far = range(length, length + 40)
    for page in range(-(-length // PAGE)):
        keys = range(page * PAGE, (page + 1) * PAGE)
        visible = any(sees(rule, query, key) for query in far for key in keys)
        assert (page not in rule.released(length, PAGE)) == visible


@given(rule=rules, length=st.integers(1, 60), step=st.integers(1, 30))
def test_most_pages_is_the_tight_bound_over_all_ways_to_step(rule: Retention, length: int, step: int) -> None:
    # Whatever the steps before, a step starts at some length with all released pages gone.
    held = max(
        -(-min(start + step, length) // PAGE) - len(rule.released(start, PAGE)) for start in range(max(1, length))
    )
    assert rule.most_pages(length, step, PAGE) == held


def test_rules_describe_themselves() -> None:
    assert (ALL.sink, ALL.window, ALL.name) == (0, UNLIMITED, "all")
    rule = KeepSinkRecent(64, 256)
    assert (rule.sink, rule.window, rule.name) == (64, 256, "sink64+recent256")
    for sink, recent in ((-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"not sink {sink}, recent {recent}"):
            KeepSinkRecent(sink, recent)


def test_heads_with_equal_rules_share_a_group() -> None:
    a, b = (ALL, STREAM), (ALL, ALL)
    assert group_heads([[a, b, a], [b, b, b], [b, a, b]]) == (
        HeadGroup(((0, (0, 2)), (2, (1,))), "all/sink4+recent6"),
        HeadGroup(((0, (1,)), (1, (0, 1, 2)), (2, (0, 2))), "all"),
    )


def test_each_head_is_covered_once() -> None:
    for slots in (((0, (0, 1)), (1, (1,))), ((0, (0, 0, 1)),), ((0, (1,)),)):
        with pytest.raises(AssertionError, match="KV heads exactly once"):
            KVCache([HeadGroup(slots)], [4], ratio=1, head_dim=2, dtype=torch.float32)


def test_tables_grow_into_ascending_neighbours() -> None:
    pool = make_pool(64)
    first = pool.take(8)
    assert first.tolist() == list(range(8))
    second = pool.take(4)
    assert np.diff(second).tolist() == [1, 1, 1]
    # Both sequences find the pages behind their own free.
    assert pool.take(8, after=7).tolist() == list(range(8, 16))
    assert pool.take(6, after=int(second[-1])).tolist() == list(range(second[-1] + 1, second[-1] + 7))


def test_a_run_goes_as_far_as_it_can_and_goes_on_in_the_longest_free_runs() -> None:
    pool = make_pool(32)
    pool.take(32)
    pool.release(np.array([4, 5, 8, 9, 14, 20, 21, 22, 23, 24, 25], dtype=np.int32))
    assert pool.take(5, after=3).tolist() == [4, 5, 23, 24, 25]  # a long run is entered in its middle
    assert pool.take(4).tolist() == [8, 20, 21, 22]
    assert pool.take(2).tolist() == [9, 14]
    assert (pool.num_free, pool.num_owned) == (0, 32)


@given(data=st.data())
def test_a_pool_hands_out_every_page_once(data: st.DataObject) -> None:
    pool, owned = make_pool(30), set[int]()
    for _ in range(12):
        if owned and data.draw(st.booleans()):
            back = data.draw(st.lists(st.sampled_from(sorted(owned)), unique=True))
            pool.release(np.array(back, dtype=np.int32))
            owned -= set(back)
        count = data.draw(st.integers(0, pool.available))
        pages = pool.take(count, after=data.draw(st.integers(-1, 29))).tolist()
        assert len(set(pages)) == count and not owned & set(pages)
        owned |= set(pages)
        pool.audit(np.bincount(sorted(owned), minlength=30))
    with pytest.raises(OutOfPages, match="can be had"):
        pool.take(pool.available + 1)


def test_the_page_released_first_is_evicted_first() -> None:
    pool = make_pool(8)
    pages = pool.take(8)
    for page in pages.tolist():
        pool.index.enter(b"%d" % page, page)
    pool.release(pages[[5, 2, 7, 0]])
    pool.share(pages[[2]])  # a hit revives
    assert list(pool.cached_pages()) == [5, 7, 0]
    assert pool.take(2).tolist() == [5, 7]
    assert pool.index.find(b"5") == pool.index.find(b"7") == NULL_PAGE
    pool.release(pages[[2]])
    assert list(pool.cached_pages()) == [0, 2]  # and counts as a use


def test_a_large_pool_evicts_some_pages_ahead() -> None:
    pool = make_pool(1024)
    pages = pool.take(1024)
    for page in pages.tolist():
        pool.index.enter(b"%d" % page, page)
    pool.release(pages[::-1])
    taken = pool.take(1)
    for _ in range(7):
        taken = np.concatenate([taken, pool.take(1, after=int(taken[-1]))])
    assert np.diff(taken).tolist() == [1] * 7
    assert pool.num_free + pool.num_cached + 8 == 1024


def test_growing_and_trimming_follow_the_rules() -> None:
    cache = make_cache()
    table = cache.table((ALL, STREAM), b"")
    for _ in range(8):
        advance(cache, table, 5)
    # The query at 40 sees positions 0..3 and 35..40.
    kept_all, streamed = table.pages
    assert NULL_PAGE not in kept_all and len(kept_all) == 10
    assert [page != NULL_PAGE for page in streamed] == [True] + [False] * 7 + [True] * 2
    assert table.held == (10, 3)
    assert cache.pages_needed(table.rules, 40, 5) == (10, 5)
    assert [s.pages_owned for s in cache.stats()] == [10, 3]
    assert [s.pages_cached for s in cache.stats()] == [0, 7]
    assert [s.rule for s in cache.stats()] == ["all", "sink4+recent6"]
    cache.drop(table)
    cache.drop(table)
    cache.audit()
    assert (table.length, table.pages, cache.available()) == (0, [[], []], cache.capacity)


def test_of_the_pages_released_together_the_deepest_is_evicted_first() -> None:
    cache = make_cache()
    table = cache.table((ALL, STREAM), b"")
    cache.grow(table, 24)
    streamed = table.pages[1]
    cache.seal(table, range(24))
    cache.trim(table)
    assert list(cache.pools[1].cached_pages()) == streamed[3:0:-1]
    cache.drop(table)
    assert list(cache.pools[1].cached_pages()) == [*streamed[3:0:-1], *streamed[5:3:-1], streamed[0]]


def test_growing_is_all_or_nothing() -> None:
    cache = make_cache((8, 4))
    table = cache.table((ALL, STREAM), b"")
    advance(cache, table, 9)
    before = (table.length, table.pages, cache.available())
    assert cache.can_grow(table, 7) and not cache.can_grow(table, 8)
    with pytest.raises(OutOfPages, match="2 more pages of group 1, and 1 of 4 can be had"):
        cache.grow(table, 8)
    assert (table.length, table.pages, cache.available()) == before
    cache.audit()
    advance(cache, table, 4)
    assert cache.can_grow(table, 4)  # the window has moved on and has left a page behind


def test_can_grow_counts_cached_pages() -> None:
    cache = make_cache((8, 8))
    first = cache.table((ALL, STREAM), b"first")
    advance(cache, first, 32)
    cache.drop(first)
    assert [s.pages_cached for s in cache.stats()] == [8, 8]
    second = cache.table((ALL, STREAM), b"second")
    assert cache.can_grow(second, 32) and not cache.can_grow(second, 33)
    advance(cache, second, 32)
    assert [s.pages_owned for s in cache.stats()] == [8, 3]


def test_tables_of_one_pool_may_keep_different_rules() -> None:
    cache = make_cache()
    exact, fast = cache.table((ALL, ALL), b"exact"), cache.table((ALL, STREAM), b"fast")
    for _ in range(4):
        advance(cache, exact, 8)
        advance(cache, fast, 8)
    assert (exact.held, fast.held) == ((8, 8), (8, 3))
    views = cache.views([fast, exact]).layer(0)
    assert views[1].sink.tolist() == [[4], [0]]
    assert views[1].window.tolist() == [[6], [UNLIMITED]]


def test_views_show_tables_side_by_side() -> None:
    groups = group_heads([[ALL, STREAM, STREAM], [STREAM, ALL, ALL]])
    cache = KVCache(groups, [20, 20], ratio=3, head_dim=2, dtype=torch.bfloat16, page_size=PAGE)
    long, short = cache.table((ALL, STREAM), b""), cache.table((ALL, STREAM), b"")
    for _ in range(3):
        advance(cache, long, 8)
    advance(cache, short, 3)
    views = cache.views([short, long])
    assert views.heads(0) == ((0,), (1, 2)) and views.heads(1) == ((1, 2), (0,))
    for layer in range(2):
        for group, (kv, heads) in enumerate(zip(views.layer(layer), views.heads(layer), strict=True)):
            assert tuple(kv.heads.tolist()) == heads
            assert kv.table.tolist() == [short.pages[group] + [NULL_PAGE] * 5, long.pages[group]]
            assert kv.length.tolist() == [3, 24]
            rule = (ALL, STREAM)[group]
            assert kv.sink.tolist() == [[rule.sink] * len(heads)] * 2
            assert kv.window.tolist() == [[rule.window] * len(heads)] * 2
            assert kv.k.shape == kv.v.shape == (len(heads), 20, PAGE, 2)
            assert kv.ratio == 3 and kv.page_size == PAGE and kv.k.dtype == torch.bfloat16
            assert all(x.is_contiguous() for x in (kv.table, kv.length, kv.sink, kv.window))
    assert views.layer(0)[0].table is views.layer(1)[0].table
    # Every head of every layer has memory of its own.
    memory = [x for layer in range(2) for view in views.layer(layer) for pool in (view.k, view.v) for x in pool]
    spans = sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in memory)
    assert len(spans) == 12 and all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def test_views_are_a_snapshot() -> None:
    cache = make_cache()
    table = cache.table((ALL, STREAM), b"")
    cache.grow(table, 24)
    view = cache.views([table]).layer(0)[1]
    before = view.table.clone()
    cache.seal(table, range(24))
    cache.trim(table)
    assert NULL_PAGE in table.pages[1] and torch.equal(view.table, before)


def test_streaming_heads_give_half_of_the_memory_back() -> None:
    """Half of the KV heads stream with 64 + 256 tokens: 32K tokens hold at most 52 % of the dense bytes."""
    stream = KeepSinkRecent(sink=64, recent=256)
    groups = group_heads([[ALL, stream], [stream, ALL]])
    dense = 2 * 4 * 32768 * 2 * 4  # k and v, heads, tokens, head_dim, bytes
    cache = KVCache(groups, [520, 60], ratio=1, head_dim=2, dtype=torch.float32)
    table = cache.table((ALL, stream), b"")
    while table.length < 32768:
        cache.grow(table, 2048)
        cache.seal(table, range(table.length))
        cache.trim(table)
        cache.audit()
        held = sum(s.pages_owned * s.bytes_per_page for s in cache.stats())
        assert held <= 0.52 * dense
    assert 0.5 * dense < held  # the other half keeps all


def test_unsealed_pages_and_pages_without_prefix_caching_are_freed_at_once() -> None:
    for cache in (make_cache(), make_cache(prefix_caching=False)):
        table = cache.table((ALL, STREAM), b"")
        cache.grow(table, 18)
        if not cache.prefix_caching:
            cache.seal(table, range(18))
            cache.trim(table)
        cache.audit()
        cache.drop(table)
        assert [pool.num_free for pool in cache.pools] == [20, 20]
        assert cache.attach(table, range(18), 17) == 0
    assert cache.queried_tokens == 0


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda cache, _: cache.pools[0]._refs.__setitem__(0, 2), "page 0 has 2 references, but 1 tables name it"),
        (lambda cache, _: cache.pools[0]._free.__setitem__(0, True), "page 0 is in 2 of the states"),
        (lambda cache, _: cache.pools[0]._free.__setitem__(19, False), "page 19 is in 0 of the states"),
        (lambda cache, _: setattr(cache.pools[0], "_num_free", 3), "3 pages count as free"),
        (lambda cache, _: cache.pools[0].index.enter(b"x", 19), "page 19 is free and can be found"),
        (
            lambda cache, _: cache.pools[1].index.forget(next(cache.pools[1].cached_pages())),
            "cached but cannot be found",
        ),
        (lambda cache, _: cache.pools[0].index._page_of.__setitem__(b"y", 1), "under a key that is not its own"),
        (lambda _, table: table.rows[0].__setitem__(1, NULL_PAGE), "released while queries may still see it"),
        (lambda _, table: table.rows[0].__setitem__(1, 0), "names a page of group 0 twice"),
        (lambda _, table: setattr(table, "length", 26), "a table of 26 tokens has 6 logical pages"),
        (lambda _, table: setattr(table, "num_sealed", 7), "7 pages are sealed, 6 are full"),
        (lambda _, table: setattr(table, "num_sealed", 5), "can be found unsealed"),
        (lambda _, table: table.chain.keys.reverse(), "found under another prefix's key"),
    ],
)
def test_the_audit_finds_wrong_books(spoil, sentence: str) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache()
    table = cache.table((ALL, STREAM), b"")
    advance(cache, table, 24)
    spoil(cache, table)
    with pytest.raises(AssertionError, match=sentence):
        cache.audit()


def test_the_audit_finds_a_table_that_was_lost() -> None:
    cache = make_cache()
    table = cache.table((ALL, STREAM), b"")
    advance(cache, table, 4)
    del table
    gc.collect()
    with pytest.raises(AssertionError, match="1 references, but 0 tables name it"):
        cache.audit()


@pytest.mark.gpu
def test_views_on_a_gpu_equal_those_on_the_host() -> None:
    caches = [make_cache(device=device) for device in ("cpu", "cuda")]
    seen = []
    for cache in caches:
        tables = [cache.table((ALL, STREAM), b""), cache.table((STREAM, ALL), b"other")]
        for table, length in zip(tables, (30, 7), strict=True):
            advance(cache, table, length)
        seen.append([kv for layer in range(2) for kv in cache.views(tables).layer(layer)])
    for host, gpu in zip(*seen, strict=True):
        for name in ("table", "length", "heads", "sink", "window"):
            assert getattr(gpu, name).is_cuda and torch.equal(getattr(host, name), getattr(gpu, name).cpu())
