"""What each operation has to do at least: matrix operations and bytes. Every formula of the kernel table is here.

A multiplication and an addition are two operations; elementwise work, softmax and sorting count none. Bytes: every
input read once, every output written once, whatever a kernel reads again; an element of a tensor takes `element` bytes,
masses and log-sum-exps (float32) and the numbers of an index (int32) four, masks one. Letters: H query heads, G KV
heads, D head size, S tokens per page, N tiles, L logical pages of a sequence; a page is past for a tile when it lies
before the page of the tile's origin.

    attention             4 D (H / G) x pairs         q, out, their log-sum-exps; K and V of the keys read; the index
    page scores           2 D H x queries x past      q; one vector per past page; masses [G, N, L]
    bounds, c per page    4 c D H x queries x past    q; 2 c vectors per past page; masses
    labels, r channels    2 r H S x queries x past    q; r values per past key; masses of tokens [G, N, L S]
    gate scores           2 D G x tiles x past        a query per tile and KV head; one vector per past page; masses
    antidiagonal, s       2 D H S x groups x past     q; past keys; masses; a group is s queries of a tile
    probe                 2 D H x pairs               the probe's q; keys; two masses of tokens [G, B, L S]
    dropped pages         4 D (H / G) x pairs         q; out and log-sum-exp, read and written; two means per past page
    choose                0                           masses; a mask, or positions of tokens
    build index           0                           the mask; the runs and their pages
    store                 0                           K and V of the new tokens, read and written
    summaries             0                           the keys (labels: their channels); the table

The pairs of attention are (query, key) for each KV head: causal ones, in the pages read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

PAGE = 64
NUMBER = 4  # bytes of a float32 or an int32


class Work(NamedTuple):
    """The least that an operation does."""

    operations: float  # of the matrix unit
    bytes: float


class Tile(NamedTuple):
    """Queries at positions pos ... pos + queries - 1 of a sequence."""

    pos: int
    queries: int

    @property
    def past(self) -> int:
        """Full pages before the tile's; tiles begin in the page of their origin."""
        return self.pos // PAGE

    @property
    def seen(self) -> int:
        """Pages up to the last query's."""
        return (self.pos + self.queries - 1) // PAGE + 1

    def pairs(self, pages: int) -> int:
        """(query, key) pairs when the tile reads so many pages, its own among them."""
        own = sum(range(self.pos % PAGE + 1, self.pos % PAGE + self.queries + 1))
        return (pages - (self.seen - self.past)) * PAGE * self.queries + own


@dataclass(frozen=True)
class Sizes:
    """The sizes that every formula needs. tiles: of all sequences, `sequences` of `length` keys each."""

    query_heads: int
    kv_heads: int
    head_dim: int
    element: int  # bytes
    sequences: int
    length: int
    tiles: tuple[Tile, ...]

    @property
    def queries(self) -> int:
        return sum(tile.queries for tile in self.tiles)

    @property
    def width(self) -> int:
        """Logical pages of a sequence."""
        return -(-self.length // PAGE)

    @property
    def past(self) -> int:
        """Past pages that some tile knows of, over all sequences."""
        return self.sequences * max(tile.past for tile in self.tiles)

    @property
    def dense_pairs(self) -> int:
        """(query, key) pairs of dense attention, over all KV heads."""
        return self.kv_heads * sum(tile.pairs(tile.seen) for tile in self.tiles)

    def pairs(self, pages: Iterable[int]) -> int:
        """(query, key) pairs when each tile reads so many pages, added up over KV heads."""
        total = 0
        for tile, read in zip(self.tiles, pages, strict=True):
            own = self.kv_heads * (tile.seen - tile.past)
            total += (read - own) * PAGE * tile.queries + self.kv_heads * tile.pairs(tile.seen - tile.past)
        return total

    @property
    def _q(self) -> int:
        return self.queries * self.query_heads * self.head_dim * self.element

    def _vectors(self, per_page: float) -> float:
        return self.past * self.kv_heads * per_page * self.head_dim * self.element

    def _masses(self, per_page: int = 1) -> int:
        return NUMBER * self.kv_heads * len(self.tiles) * self.width * per_page

    @property
    def _query_pages(self) -> int:
        return sum(tile.queries * tile.past for tile in self.tiles)

    def attention(self, pairs: int, entries: int) -> Work:
        """entries: numbers of pages in the index, over all KV heads and tiles."""
        keys = min(pairs, self.kv_heads * self.sequences * self.length)
        index = NUMBER * (entries + 2 * self.kv_heads * len(self.tiles))
        moved = 2 * self._q + NUMBER * self.queries * self.query_heads + 2 * keys * self.head_dim * self.element + index
        return Work(4 * self.head_dim * (self.query_heads // self.kv_heads) * pairs, moved)

    def page_scores(self) -> Work:
        products = self.query_heads * self._query_pages
        return Work(2 * self.head_dim * products, self._q + self._vectors(1) + self._masses())

    def bound_scores(self, stretches: int) -> Work:
        products = self.query_heads * self._query_pages * stretches
        return Work(4 * self.head_dim * products, self._q + self._vectors(2 * stretches) + self._masses())

    def label_scores(self, channels: int) -> Work:
        products = self.query_heads * self._query_pages * PAGE
        known = self._vectors(PAGE) * channels / self.head_dim
        return Work(2 * channels * products, self._q + known + self._masses(PAGE))

    def gate_scores(self) -> Work:
        products = self.kv_heads * sum(tile.past for tile in self.tiles)
        asked = len(self.tiles) * self.kv_heads * self.head_dim * self.element
        return Work(2 * self.head_dim * products, asked + self._vectors(1) + self._masses())

    def antidiagonal_scores(self, stride: int) -> Work:
        groups = sum(-(-tile.queries // stride) * tile.past for tile in self.tiles)
        operations = 2 * self.head_dim * self.query_heads * PAGE * groups
        return Work(operations, self._q + self._vectors(PAGE) + self._masses())

    def probe(self, probe: int) -> Work:
        """The last queries of each sequence, of a whole prompt."""
        asked = min(probe, self.length)
        pairs = self.sequences * sum(range(self.length - asked + 1, self.length + 1))
        read = self.sequences * (asked * self.query_heads + self.length * self.kv_heads) * self.head_dim * self.element
        written = 2 * NUMBER * self.kv_heads * self.sequences * self.width * PAGE
        return Work(2 * self.head_dim * self.query_heads * pairs, read + written)

    def dropped_pages(self, pairs: int) -> Work:
        """pairs: (query, page that is not read), over all KV heads."""
        touched = 3 * self._q + 2 * NUMBER * self.queries * self.query_heads
        return Work(4 * self.head_dim * (self.query_heads // self.kv_heads) * pairs, touched + self._vectors(2))

    def choose_pages(self) -> Work:
        return Work(0, self._masses() * (1 + 1 / NUMBER))

    def choose_tokens(self, tokens: int) -> Work:
        return Work(0, self._masses(PAGE) + NUMBER * self.kv_heads * len(self.tiles) * tokens)

    def build_index(self, entries: int) -> Work:
        return Work(0, self._masses() / NUMBER + NUMBER * (entries + 2 * self.kv_heads * len(self.tiles)))

    def store(self) -> Work:
        return Work(0, 4 * self.queries * self.kv_heads * self.head_dim * self.element)

    def summaries(self, per_page: float, *, read: float = PAGE) -> Work:
        """Of every full page: vectors of D elements that are written, and that are read."""
        pages = self.sequences * (self.length // PAGE)
        return Work(0, pages * self.kv_heads * (read + per_page) * self.head_dim * self.element)


class Ceilings(NamedTuple):
    """The most that a device was seen to do."""

    operations: float  # of the matrix unit, per second
    bandwidth: float  # bytes per second

    def seconds(self, work: Work) -> float:
        """No version of the operation runs much faster."""
        return max(work.operations / self.operations, work.bytes / self.bandwidth)
