"""The physical pages of one group: memory, reference counts, free pages, and pages kept only for reuse."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from gossamer.kernels.fp8 import FP8, SCALE
from gossamer.kernels.layout import NULL_PAGE
from gossamer.kvcache.host_memory import ask_for_large_pages
from gossamer.kvcache.prefix import PrefixIndex

PageArray = npt.NDArray[np.int32]

_EVICT_AHEAD = 16  # pages evicted together at most, so that a sequence that grows page by page gets neighbours
_EVICT_SHARE = 64  # ... but no more than this part of the pool


class OutOfPages(Exception):
    """A step needs more pages than are free or can be evicted. Nothing was changed."""


class PagePool:
    """Every page is in one of three states: free, owned (by as many tables as its reference count says), or cached
    (owned by nobody, kept for a later prefix hit until the memory is needed).

    k and v: [slots, pages, page_size, head_dim], allocated once and not cleared: what has not been written is garbage.
    summaries: [slots, pages, *shape] for each shape asked for, likewise; they live and die with the pages. So do the
    scales [2, slots, pages, page_size] of keys and values that are kept as `fp8`; summaries are `dtype` always.
    """

    def __init__(
        self,
        slots: int,
        num_pages: int,
        *,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        summaries: Mapping[str, tuple[int, ...]] | None = None,
        fp8: bool = False,
    ) -> None:
        kept = FP8 if fp8 else dtype
        self.k = torch.empty(slots, num_pages, page_size, head_dim, dtype=kept, device=device)
        self.v = torch.empty_like(self.k)
        self.scale = torch.empty(2, slots, num_pages, page_size, dtype=SCALE, device=device) if fp8 else None
        self.summaries = {
            name: torch.empty(slots, num_pages, *shape, dtype=dtype, device=device)
            for name, shape in (summaries or {}).items()
        }
        for table in (self.k, self.v, *self.summaries.values()):
            ask_for_large_pages(table)
        self.index = PrefixIndex()
        self._refs = np.zeros(num_pages, dtype=np.int32)
        self._free = np.ones(num_pages, dtype=np.bool_)
        self._num_free = num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # next to be evicted first

    @property
    def num_pages(self) -> int:
        return len(self._refs)

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_owned(self) -> int:
        return self.num_pages - self._num_free - len(self._cached)

    @property
    def available(self) -> int:
        """Pages that `take` can hand out: free and cached."""
        return self._num_free + len(self._cached)

    @property
    def bytes_per_page(self) -> int:
        tables = [self.k, self.v, *self.summaries.values(), *([] if self.scale is None else self.scale)]
        return sum(table[:, 0].numel() * table.element_size() for table in tables)

    def cached_pages(self) -> Iterator[int]:
        """Cached pages, the next to be evicted first."""
        return iter(self._cached)

    def take(self, count: int, after: int = NULL_PAGE) -> PageArray:
        """`count` pages with one owner each, in runs of ascending numbers as long as can be had, beginning with the
        pages right behind `after` where those are free. Evicts cached pages when free ones do not suffice; the caller
        has checked `available`."""
        if count > self.available:
            raise OutOfPages(f"{count} pages are wanted, {self.available} of {self.num_pages} can be had.")
        if count > self._num_free:
            self._evict(max(count - self._num_free, min(_EVICT_AHEAD, self.num_pages // _EVICT_SHARE)))
        run = 0
        if after != NULL_PAGE:
            behind = self._free[after + 1 : after + 1 + count]
            run = len(behind) if behind.all() else int(behind.argmin())
            self._free[after + 1 : after + 1 + run] = False
        pages = np.arange(after + 1, after + 1 + run, dtype=np.int32)
        if run < count:
            rest = self._choose(count - run)
            self._free[rest] = False
            pages = np.concatenate([pages, rest])
        self._num_free -= count
        self._refs[pages] = 1
        return pages

    def share(self, pages: PageArray) -> None:
        """One more owner for each of these owned or cached pages."""
        for page in pages[self._refs[pages] == 0].tolist():
            del self._cached[page]
        self._refs[pages] += 1

    def release(self, pages: PageArray) -> None:
        """One owner less for each page. A page that nobody owns any more is cached when the index knows it, and free
        otherwise; the first of `pages` is evicted first."""
        self._refs[pages] -= 1
        freed = []
        for page in pages[self._refs[pages] == 0].tolist():
            if page in self.index:
                self._cached[page] = None
            else:
                freed.append(page)
        self._free[freed] = True
        self._num_free += len(freed)

    def clear_prefixes(self) -> None:
        """Forget every prefix; cached pages become free."""
        self._free[list(self._cached)] = True
        self._num_free += len(self._cached)
        self._cached.clear()
        self.index.clear()

    def audit(self, owners: npt.NDArray[np.int64]) -> None:
        """Raises AssertionError unless the books agree with `owners`, the number of tables that name each page."""
        wrong = np.flatnonzero(self._refs != owners)
        assert wrong.size == 0, (
            f"page {wrong[0]} has {self._refs[wrong[0]]} references, but {owners[wrong[0]]} tables name it"
        )
        cached = np.zeros(self.num_pages, dtype=np.bool_)
        cached[list(self._cached)] = True
        states = self._free.astype(np.int8) + cached + (self._refs > 0)
        wrong = np.flatnonzero(states != 1)
        assert wrong.size == 0, (
            f"page {wrong[0]} is in {states[wrong[0]]} of the states free, owned, cached instead of one"
        )
        assert self._num_free == self._free.sum(), f"{self._num_free} pages count as free, {self._free.sum()} are"
        for key, page in self.index:
            assert self.index.key(page) == key, f"page {page} is found under a key that is not its own"
            assert not self._free[page], f"page {page} is free and can be found as a prefix"
        for page in self._cached:
            assert page in self.index, f"page {page} is cached but cannot be found"

    def _evict(self, count: int) -> None:
        pages = [self._cached.popitem(last=False)[0] for _ in range(min(count, len(self._cached)))]
        for page in pages:
            self.index.forget(page)
        self._free[pages] = True
        self._num_free += len(pages)

    def _choose(self, count: int) -> PageArray:
        """`count` free pages from the longest runs. A long run that lies behind somebody's pages is entered in its
        middle, so that the sequence in front of it can go on growing into it."""
        padded = np.zeros(self.num_pages + 2, dtype=np.int8)
        padded[1:-1] = self._free
        edges = np.flatnonzero(np.diff(padded))
        starts, stops = edges[::2], edges[1::2]
        longest = int((stops - starts).argmax())
        start, stop = int(starts[longest]), int(stops[longest])
        if stop - start >= count:
            if start > 0 and stop - start >= 2 * count:
                start += (stop - start) // 2
            return np.arange(start, start + count, dtype=np.int32)
        picked: list[npt.NDArray[np.int64]] = []
        for run in np.argsort(starts - stops, kind="stable").tolist():
            stop = min(int(stops[run]), int(starts[run]) + count)
            picked.append(np.arange(starts[run], stop))
            count -= stop - int(starts[run])
            if count == 0:
                break
        return np.sort(np.concatenate(picked)).astype(np.int32)
