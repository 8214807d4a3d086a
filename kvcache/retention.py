"""Retention rules: which pages of a sequence a KV head keeps behind the last computed token."""

from dataclasses import dataclass

from gossamer.kernels.layout import UNLIMITED


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Every page stays until the sequence ends."""

    @property
    def sink(self) -> int:
        """Tokens at the start that stay visible whatever the window."""
        return 0

    @property
    def window(self) -> int:
        """Most recent tokens that a query may see, its own included."""
        return UNLIMITED

    @property
    def name(self) -> str:
        return "all"

    def released(self, length: int, page_size: int) -> range:
        """The logical pages that no query at position >= `length` may see: none."""
        return range(0)

    def most_pages(self, length: int, step_tokens: int, page_size: int) -> int:
        """The most pages a sequence holds at once while it grows to `length` tokens."""
        return -(-length // page_size)


@dataclass(frozen=True, slots=True)
class KeepSinkRecent:
    """The first `sink` tokens and the last `recent` ones (own token included) stay; both in tokens.

    Memory is released in whole pages: a page goes once no later query may see any token of it.
    Raises ValueError for a negative sink or an empty window.
    """

    sink: int
    recent: int

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise ValueError(
                f"KeepSinkRecent needs sink >= 0 and recent >= 1 in tokens, not sink {self.sink}, recent {self.recent}."
            )

    @property
    def window(self) -> int:
        """Most recent tokens that a query may see, its own included."""
        return self.recent

    @property
    def name(self) -> str:
        return f"sink{self.sink}+recent{self.recent}"

    def released(self, length: int, page_size: int) -> range:
        """The logical pages that no query at position >= `length` may see.

        The query at `length` sees positions from length - recent + 1 on, later queries see less. The range's start
        does not depend on `length` and its stop never falls as `length` grows.
        """
        first = -(-self.sink // page_size)
        return range(first, max(first, (length - self.recent + 1) // page_size))

    def most_pages(self, length: int, step_tokens: int, page_size: int) -> int:
        """The most pages a sequence holds at once while it grows to `length` tokens in steps of at most `step_tokens`,
        trimmed after each step.

        Before a step the oldest page kept can hold page_size - 1 tokens that nobody sees any more, then come the
        recent - 1 tokens before the step's first query, then the step's own: that is the tight bound for the tail.
        """
        tail = page_size - 1 + self.recent - 1 + step_tokens
        return min(-(-length // page_size), -(-self.sink // page_size) - (-tail // page_size))


Retention = KeepAll | KeepSinkRecent
