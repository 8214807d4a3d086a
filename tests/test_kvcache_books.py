"""Random lives of sequences against a second, naive set of books, with the contents of every visible position."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from zlib import crc32

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gossamer.kernels.layout import NULL_PAGE
from gossamer.kvcache.cache import KVCache, OutOfPages, PageTable
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent, Retention

PAGE = 4
GROUPS = group_heads([[0, 1, 2], [2, 1, 1]])
POINTS: tuple[tuple[Retention, ...], ...] = (
    (KeepAll(), KeepAll(), KeepAll()),
    (KeepAll(), KeepSinkRecent(3, 7), KeepSinkRecent(0, 9)),
    (KeepSinkRecent(5, 12), KeepSinkRecent(4, 1), KeepSinkRecent(0, 9)),
)


class Page:
    """A physical page of the model. Two sequences share it when they hold the same object."""

    key: Hashable = None


@dataclass(eq=False)
class Life:
    """One sequence: its tokens are 1 up to `branch` and `variant` from there on."""

    table: PageTable
    point: int
    salt: bytes
    branch: int
    variant: int
    computed: int = 0
    offered: int = 0  # pages that were sealed; each is offered to the index once
    pages: list[list[Page | None]] = field(default_factory=lambda: [[] for _ in GROUPS])

    def tokens(self, count: int) -> list[int]:
        return [1 if i < self.branch else self.variant for i in range(count)]

    def key(self, page: int) -> tuple[bytes, tuple[int, ...]]:
        return self.salt, tuple(self.tokens((page + 1) * PAGE))

    def content(self, position: int) -> float:
        return float(crc32(self.salt + bytes(self.tokens(position + 1))) & 0xFFFF)


class Books(RuleBasedStateMachine):
    """The model knows pages as objects, looks everything up by walking over it, and evicts from a plain list."""

    @initialize(num_pages=st.tuples(*[st.integers(8, 20)] * 3))
    def start(self, num_pages: tuple[int, ...]) -> None:
        self.cache = KVCache(GROUPS, num_pages, ratio=1, head_dim=1, dtype=torch.float32, page_size=PAGE)
        self.lives: list[Life] = []
        self.index: list[dict[Hashable, Page]] = [{} for _ in GROUPS]
        self.cached: list[list[Page]] = [[] for _ in GROUPS]  # next to be evicted first

    def owners(self, group: int) -> Counter[Page]:
        return Counter(page for life in self.lives for page in life.pages[group] if page is not None)

    def free(self, group: int) -> int:
        return self.cache.capacity[group] - len(self.owners(group)) - len(self.cached[group])

    def let_go(self, life: Life, group: int, numbers: list[int]) -> None:
        for number in sorted(numbers, reverse=True):
            page, life.pages[group][number] = life.pages[group][number], None
            if page is not None and self.owners(group)[page] == 0 and page.key is not None:
                self.cached[group].append(page)

    @rule(
        point=st.integers(0, 2),
        salt=st.sampled_from([b"", b"", b"", b"salt"]),
        branch=st.sampled_from([0, 13, 24, 60]),
        variant=st.integers(2, 3),
        prompt=st.integers(1, 60),
        chunk=st.sampled_from([0, 8, 60]),
    )
    def arrive(self, point: int, salt: bytes, branch: int, variant: int, prompt: int, chunk: int) -> None:
        life = Life(self.cache.table(POINTS[point], salt), point, salt, branch, variant)
        self.lives.append(life)
        self.attach(life, prompt)
        self.grow(life, min(chunk, prompt - life.computed))
        self.compute([life], trims=True)

    def attach(self, life: Life, prompt: int) -> None:
        hit = self.cache.attach(life.table, life.tokens(prompt), prompt - 1)
        best: list[set[int]] = [set() for _ in GROUPS]
        for pages in range(1, (prompt - 1) // PAGE + 1):
            needs = [set(range(pages)) - set(r.released(pages * PAGE, PAGE)) for r in POINTS[life.point]]
            if all(life.key(page) in index for index, need in zip(self.index, needs, strict=True) for page in need):
                best, life.computed = needs, pages * PAGE
        assert hit == life.table.length == life.computed
        life.offered = hit // PAGE
        for group, need in enumerate(best):
            for page in range(hit // PAGE):
                found = self.index[group][life.key(page)] if page in need else None
                if found in self.cached[group]:
                    self.cached[group].remove(found)
                life.pages[group].append(found)

    @precondition(lambda self: self.lives)
    @rule(
        data=st.data(), computes=st.sampled_from([True, True, True, False]), trims=st.sampled_from([True, True, False])
    )
    def step(self, data: st.DataObject, computes: bool, trims: bool) -> None:
        """Some sequences grow where there is room. Then the step is computed, or left hanging as when it fails."""
        step = data.draw(st.lists(st.sampled_from(self.lives), unique=True, min_size=1))
        for life in step:
            self.grow(life, data.draw(st.integers(0, 30)))
        if computes:
            self.compute(step, trims)

    def grow(self, life: Life, tokens: int) -> None:
        more = -(-(life.table.length + tokens) // PAGE) - len(life.pages[0])
        fits = all(more <= self.free(group) + len(self.cached[group]) for group in range(len(GROUPS)))
        assert self.cache.can_grow(life.table, tokens) == fits
        if not fits:
            with pytest.raises(OutOfPages, match=f"cannot grow by {tokens}"):
                self.cache.grow(life.table, tokens)
            return
        self.cache.grow(life.table, tokens)
        for group, cached in enumerate(self.cached):
            for _ in range(more - self.free(group)):
                del self.index[group][cached.pop(0).key]
            life.pages[group] += [Page() for _ in range(more)]

    def compute(self, step: list[Life], trims: bool) -> None:
        views = self.cache.views([life.table for life in step])
        for layer in range(2):
            for kv in views.layer(layer):
                for row, life in enumerate(step):
                    for position in range(life.computed, life.table.length):
                        page = int(kv.table[row, position // PAGE])
                        kv.k[:, page, position % PAGE] = life.content(position) + kv.heads[:, None]
                        kv.v[:, page, position % PAGE] = -life.content(position)
        for life in step:
            length = life.computed = life.table.length
            self.cache.seal(life.table, life.tokens(length + 1))
            for group, index in enumerate(self.index):
                for number in range(life.offered, length // PAGE):
                    page = life.pages[group][number]
                    if page is not None and life.key(number) not in index:
                        page.key = life.key(number)
                        index[page.key] = page
            life.offered = length // PAGE
            if trims:
                self.cache.trim(life.table)
                for group, keep in enumerate(POINTS[life.point]):
                    self.let_go(life, group, list(keep.released(length, PAGE)))

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), returns=st.booleans(), prompt=st.integers(1, 60))
    def drop(self, data: st.DataObject, returns: bool, prompt: int) -> None:
        """Finished, cancelled before its step was computed, or preempted and back at once."""
        life = data.draw(st.sampled_from(self.lives))
        self.cache.drop(life.table)
        for group in range(len(GROUPS)):
            self.let_go(life, group, list(range(len(life.pages[group]))))
        life.pages, life.computed, life.offered = [[] for _ in GROUPS], 0, 0
        if returns:
            self.attach(life, prompt)
        else:
            self.lives.remove(life)

    @rule()
    def clear_prefixes(self) -> None:
        self.cache.clear_prefixes()
        for group, index in enumerate(self.index):
            for page in index.values():
                page.key = None
            index.clear()
            self.cached[group].clear()

    @invariant()
    def books_agree(self) -> None:
        self.cache.audit()
        for group, (stats, pool) in enumerate(zip(self.cache.stats(), self.cache.pools, strict=True)):
            assert stats.pages_owned == len(self.owners(group))
            assert stats.pages_cached == len(self.cached[group])
            assert pool.num_free == self.free(group)
            assert len(pool.index) == len(self.index[group])
            twins = {
                (page, physical)
                for life in self.lives
                for page, physical in zip(life.pages[group], life.table.pages[group], strict=True)
            }
            assert all((page is None) == (physical == NULL_PAGE) for page, physical in twins)
            assert len(twins) == len({page for page, _ in twins}) == len({physical for _, physical in twins})
            pool.k[:, torch.from_numpy(pool._free)] = torch.nan

    @invariant()
    def contents_are_those_of_the_tokens(self) -> None:
        for life in self.lives:
            views = self.cache.views([life.table])
            positions = torch.arange(life.computed)
            content = torch.tensor([life.content(p) for p in range(life.computed)])
            for layer in range(2):
                for kv in views.layer(layer):
                    seen = (positions > life.computed - kv.window[0, 0]) | (positions < kv.sink[0, 0])
                    pages = kv.table[0, positions[seen] // PAGE].long()
                    assert (pages != NULL_PAGE).all()
                    k = kv.k[:, pages, positions[seen] % PAGE, 0] - kv.heads[:, None]
                    assert torch.equal(k, content[seen].expand(len(kv.heads), -1))
                    assert torch.equal(kv.v[:, pages, positions[seen] % PAGE, 0], -content[seen].expand_as(k))


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
