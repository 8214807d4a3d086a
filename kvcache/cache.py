"""The KV cache: every sequence's pages, in every group of heads, and where a layer's heads store their keys."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gossamer.kernels.layout import NULL_PAGE, PAGE_SIZE
from gossamer.kvcache.groups import HeadGroup
from gossamer.kvcache.pool import OutOfPages, PagePool
from gossamer.kvcache.prefix import reusable_pages
from gossamer.kvcache.retention import Retention
from gossamer.kvcache.summaries import Summary, shapes_by_group
from gossamer.kvcache.table import PageTable
from gossamer.kvcache.views import Room, StepViews, ViewPlan

__all__ = ["KVCache", "OutOfPages", "PageTable", "PoolStats", "StepViews"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """The pages of one group of heads. pages = pages_owned + pages_cached + free ones."""

    rule: str  # the group's name
    heads: int  # KV heads, over all layers
    pages: int
    pages_owned: int  # by running sequences
    pages_cached: int  # kept only for prefix reuse
    bytes_per_page: int


class KVCache:
    """Pages of `page_size` tokens, one pool per group of heads, handed to sequences as these grow.

    The order for a sequence: `table`, `attach` once, then for each step `grow`, `views`, the forward pass, `seal`,
    `trim`; `drop` at the end, at cancellation, or to preempt (the table can then be attached again). Full pages never
    change: they can be shared by sequences with the same beginning, and when their last owner lets go they stay
    findable until their memory is needed. Not thread-safe: one thread owns it; `stats` may be read from any.

    groups: cover each KV head of each layer exactly once. num_pages: per group. ratio: query heads per KV head.
    summaries: [layer][KV head], what is to be known of each full page beside its keys and values. dtype: of the model;
    `fp8` keeps keys and values in half of bfloat16's memory (kernels/fp8.py).
    """

    def __init__(
        self,
        groups: Sequence[HeadGroup],
        num_pages: Sequence[int],
        *,
        ratio: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_size: int = PAGE_SIZE,
        prefix_caching: bool = True,
        summaries: Sequence[Sequence[Sequence[Summary]]] = (),
        fp8: bool = False,
    ) -> None:
        self.groups = tuple(groups)
        self.page_size = page_size
        self.dtype = dtype
        self.prefix_caching = prefix_caching
        self.queried_tokens = 0  # tokens of the sequences that asked for a prefix, since start
        self.hit_tokens = 0  # ... and those of them that were found
        self.pools = tuple(
            PagePool(
                group.num_heads,
                pages,
                page_size=page_size,
                head_dim=head_dim,
                dtype=dtype,
                device=device,
                summaries=shapes,
                fp8=fp8,
            )
            for group, pages, shapes in zip(
                self.groups, num_pages, shapes_by_group(self.groups, summaries, page_size, head_dim), strict=True
            )
        )
        self._plan = ViewPlan(self.groups, self.pools, ratio, summaries)
        # Weak, so that a table that was lost without `drop` shows up in the audit as pages without an owner.
        self._tables: weakref.WeakSet[PageTable] = weakref.WeakSet()

    @property
    def capacity(self) -> tuple[int, ...]:
        """Pages of each group."""
        return tuple(pool.num_pages for pool in self.pools)

    @property
    def stored_as(self) -> str:
        """The type of keys and values, as torch names it."""
        return str(self.pools[0].k.dtype).removeprefix("torch.")

    def available(self) -> tuple[int, ...]:
        """Pages of each group that can be had now: free ones and cached ones."""
        return tuple(pool.available for pool in self.pools)

    def pages_needed(self, rules: Sequence[Retention], length: int, step_tokens: int) -> tuple[int, ...]:
        """Per group, the most pages a sequence holds at once while it grows to `length` tokens in steps of at most
        `step_tokens`."""
        return tuple(rule.most_pages(length, step_tokens, self.page_size) for rule in rules)

    def table(self, rules: Sequence[Retention], salt: bytes) -> PageTable:
        """A new, empty table. `rules`: one per group. Tables share pages only when their salts are equal, so the salt
        must hold whatever decides what the keys and values are, beside the tokens."""
        assert len(rules) == len(self.groups), f"{len(rules)} rules for {len(self.groups)} groups"
        return PageTable(rules, salt, self.page_size)

    def attach(self, table: PageTable, tokens: Sequence[int], limit: int) -> int:
        """Let an empty table begin with the longest computed prefix of `tokens` that its rules can go on from.

        Returns its length n, a multiple of the page size and at most `limit` (a caller that wants logits leaves at
        least one token to compute). Afterwards table.length == n and the table owns what it needs of the prefix; pages
        that its rules would have released by then are NULL_PAGE.
        """
        assert table.num_pages == 0, "only an empty table can be attached"
        if not self.prefix_caching:
            return 0
        self.queried_tokens += len(tokens)
        indexes = [pool.index for pool in self.pools]
        count = reusable_pages(
            table.chain, tokens, max(0, min(limit, len(tokens))), indexes, table.rules, self.page_size
        )
        if count == 0:
            return 0
        self._tables.add(table)
        rows = table.extend(count)
        rows.fill(NULL_PAGE)
        table.length, table.num_sealed = count * self.page_size, count
        for group, (pool, rule) in enumerate(zip(self.pools, table.rules, strict=True)):
            released = rule.released(table.length, self.page_size)
            head = min(count, released.start) if released else count
            for first, last in ((0, head), (max(head, released.stop), count)):
                rows[group, first:last] = [pool.index.find(key) for key in table.chain.keys[first:last]]
            pool.share(rows[group][rows[group] != NULL_PAGE])
            table.num_trimmed[group] = released.stop
        self.hit_tokens += table.length
        return table.length

    def can_grow(self, table: PageTable, num_tokens: int) -> bool:
        """Whether `grow` would succeed now."""
        more = self._more_pages(table, num_tokens)
        return all(more <= pool.available for pool in self.pools)

    def grow(self, table: PageTable, num_tokens: int) -> None:
        """Make room for the next step's tokens: table.length += num_tokens. Cached pages are evicted as needed, least
        recently used first. Raises OutOfPages, with nothing changed, when a group has too few pages."""
        assert num_tokens >= 0
        more = self._more_pages(table, num_tokens)
        for group, pool in enumerate(self.pools):
            if more > pool.available:
                raise OutOfPages(
                    f"A sequence of {table.length} tokens cannot grow by {num_tokens}: it needs {more} more pages of "
                    f"group {group}, and {pool.available} of {pool.num_pages} can be had."
                )
        if more:
            self._tables.add(table)
            last = table.rows[:, -1].tolist() if table.num_pages else [NULL_PAGE] * len(self.pools)
            rows = table.extend(more)
            for row, pool, after in zip(rows, self.pools, last, strict=True):
                row[:] = pool.take(more, after)
        table.length += num_tokens

    def seal(self, table: PageTable, tokens: Sequence[int], length: int | None = None) -> None:
        """After a step was computed: pages that became full can be found as a prefix from now on. `tokens`: the
        sequence's tokens so far, at least the first `length` of them, which were computed (table.length unless given).
        Where another sequence was first with the same page, its page stays the one that is found."""
        full = (table.length if length is None else length) // self.page_size
        if not self.prefix_caching or full <= table.num_sealed:
            return
        keys = table.chain.extend(tokens, full)
        for row, pool in zip(table.rows[:, table.num_sealed : full].tolist(), self.pools, strict=True):
            for key, page in zip(keys[table.num_sealed : full], row, strict=True):
                if page != NULL_PAGE:
                    pool.index.enter(key, page)
        table.num_sealed = full

    def trim(self, table: PageTable) -> None:
        """After `seal`: give up the pages that no later query of the sequence may see."""
        for group, (pool, rule) in enumerate(zip(self.pools, table.rules, strict=True)):
            released = rule.released(table.length, self.page_size)
            first, last = max(released.start, table.num_trimmed[group]), released.stop
            if first < last:
                pool.release(table.rows[group, first:last][::-1])
                table.rows[group, first:last] = NULL_PAGE
                table.num_trimmed[group] = last

    def drop(self, table: PageTable) -> None:
        """Give everything back, whatever the sequence was doing; twice is harmless. Full pages that were sealed stay
        findable; of these the last ones are evicted first, because a prefix is worth nothing without its beginning."""
        for row, pool in zip(table.rows, self.pools, strict=True):
            pool.release(row[row != NULL_PAGE][::-1])
        table.clear()
        self._tables.discard(table)

    def views(self, tables: Sequence[PageTable]) -> StepViews:
        """What the step's layers read and write, one row per table; valid until a table changes. After `grow`."""
        return self._plan.views(tables)

    def room(self, rows: int, width: int) -> Room:
        """Memory that shows the tables of one step after another, of at most `rows` sequences and `width` pages."""
        return self._plan.room(rows, width)

    def fill(self, room: Room, tables: Sequence[PageTable]) -> None:
        """What `views` would show, in the room: valid until it is filled again."""
        self._plan.fill(room, tables)

    def stats(self) -> tuple[PoolStats, ...]:
        """Per group."""
        return tuple(
            PoolStats(
                rule=group.name,
                heads=group.num_heads,
                pages=pool.num_pages,
                pages_owned=pool.num_owned,
                pages_cached=pool.num_cached,
                bytes_per_page=pool.bytes_per_page,
            )
            for group, pool in zip(self.groups, self.pools, strict=True)
        )

    def clear_prefixes(self) -> None:
        """Forget all prefixes. Running sequences keep their pages, and those of their pages that are full are not
        findable any more."""
        for pool in self.pools:
            pool.clear_prefixes()

    def audit(self) -> None:
        """Raises AssertionError with a sentence if the books are wrong. For tests: it walks over every page."""
        tables = list(self._tables)
        for table in tables:
            self._audit_table(table)
        for group, pool in enumerate(self.pools):
            named = [table.rows[group][table.rows[group] != NULL_PAGE] for table in tables]
            owners = np.bincount(np.concatenate([np.empty(0, np.int64), *named]), minlength=pool.num_pages)
            try:
                pool.audit(owners)
            except AssertionError as error:
                raise AssertionError(f"group {group}: {error}") from None

    def _audit_table(self, table: PageTable) -> None:
        full = table.length // self.page_size
        assert table.num_pages == self._pages(table.length), (
            f"a table of {table.length} tokens has {table.num_pages} logical pages"
        )
        assert table.num_sealed <= full, f"{table.num_sealed} pages are sealed, {full} are full"
        for group, (pool, row, rule) in enumerate(zip(self.pools, table.rows, table.rules, strict=True)):
            released = rule.released(table.length, self.page_size)
            must = np.ones(table.num_pages, dtype=np.bool_)
            must[released.start : released.stop] = False
            gone = np.flatnonzero(must & (row == NULL_PAGE))
            assert gone.size == 0, (
                f"logical page {gone[0]} of group {group} was released while queries may still see it"
            )
            own = row[row != NULL_PAGE]
            assert len(np.unique(own)) == len(own), f"a table names a page of group {group} twice"
            for page in row[table.num_sealed :].tolist():
                assert page == NULL_PAGE or page not in pool.index, (
                    f"page {page} of group {group} can be found unsealed"
                )
            shared = pool.index
            for key, page in zip(table.chain.keys, row[: table.num_sealed].tolist(), strict=False):
                known = shared.key(page)
                assert known is None or known == key, (
                    f"page {page} of group {group} is found under another prefix's key"
                )

    def _pages(self, length: int) -> int:
        return -(-length // self.page_size)

    def _more_pages(self, table: PageTable, num_tokens: int) -> int:
        return self._pages(table.length + num_tokens) - table.num_pages
