"""A sequence's page table."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gossamer.kernels.layout import NULL_PAGE
from gossamer.kvcache.prefix import HashChain
from gossamer.kvcache.retention import Retention

_FIRST_PAGES = 16


class PageTable:
    """One sequence's memory: which physical page holds each of its logical pages, in every group.

    length: tokens computed, or being computed in the current step. rules: the retention rule of each group. Tables are
    made and changed by KVCache alone.
    """

    __slots__ = (
        "__weakref__",
        "_rows",
        "chain",
        "length",
        "num_pages",
        "num_sealed",
        "num_trimmed",
        "rules",
        "visible",
    )

    def __init__(self, rules: Sequence[Retention], salt: bytes, page_size: int) -> None:
        self.rules = tuple(rules)
        self.chain = HashChain(salt, page_size)
        # [2, groups]: what a query may see through each group, its sink and its window.
        self.visible = np.array([[rule.sink for rule in rules], [rule.window for rule in rules]], dtype=np.int32)
        self._rows = np.full((len(self.rules), _FIRST_PAGES), NULL_PAGE, dtype=np.int32)
        self.clear()

    def clear(self) -> None:
        """Forget every page. The keys of the chain stay, so a sequence that comes back is not hashed again."""
        self.length = 0
        self.num_pages = 0  # logical pages, the same in every group
        self.num_sealed = 0  # logical pages from the start that were offered to the prefix index
        self.num_trimmed = [0] * len(self.rules)  # per group: below this logical page nothing is left to release

    @property
    def rows(self) -> npt.NDArray[np.int32]:
        """[groups, logical pages], physical page or NULL_PAGE; a view, to be written in place."""
        return self._rows[:, : self.num_pages]

    @property
    def pages(self) -> list[list[int]]:
        """Per group: logical to physical page, or NULL_PAGE where the page was released. A copy."""
        return [row.tolist() for row in self.rows]

    @property
    def held(self) -> tuple[int, ...]:
        """Pages held in each group."""
        return tuple(np.count_nonzero(self.rows != NULL_PAGE, axis=1).tolist())

    def extend(self, num_pages: int) -> npt.NDArray[np.int32]:
        """Append logical pages; [groups, num_pages] of them to be filled in."""
        first, self.num_pages = self.num_pages, self.num_pages + num_pages
        capacity = self._rows.shape[1]
        if self.num_pages > capacity:
            wider = np.full((len(self.rules), max(self.num_pages, 2 * capacity)), NULL_PAGE, dtype=np.int32)
            wider[:, :first] = self._rows[:, :first]
            self._rows = wider
        return self._rows[:, first : self.num_pages]
