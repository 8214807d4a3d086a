"""The least that each operation does, against numbers counted by hand and against the real index."""

import pytest
import torch

from gossamer.attention.selectors.budget import Budget
from gossamer.server.bench.layer import Layer, Shape, paged
from gossamer.server.bench.work import Ceilings, Sizes, Tile, Work

# Four query heads, two KV heads of 8, two bytes; a prompt of 200 tokens in tiles of 64: three full pages and one of 8.
PROMPT = Sizes(4, 2, 8, 2, 1, 200, (Tile(0, 64), Tile(64, 64), Tile(128, 64), Tile(192, 8)))
# The last token of each of three sequences of 130.
TOKENS = Sizes(4, 2, 8, 2, 3, 130, (Tile(129, 1),) * 3)


def test_a_tile_knows_its_pages_and_pairs() -> None:
    tile = Tile(96, 32)  # the second half of page 1
    assert (tile.past, tile.seen) == (1, 2)
    assert tile.pairs(2) == sum(range(97, 129))  # everything before each query, and itself
    assert tile.pairs(1) == sum(range(33, 65))  # its own page alone
    assert Tile(0, 128).pairs(2) == 128 * 129 // 2


def test_dense_pairs_are_the_causal_triangle() -> None:
    assert PROMPT.dense_pairs == 2 * 200 * 201 // 2
    assert PROMPT.pairs([2 * tile.seen for tile in PROMPT.tiles]) == PROMPT.dense_pairs
    assert TOKENS.dense_pairs == 2 * 3 * 130


def test_pairs_of_an_index_differ_by_head() -> None:
    """One head of the third tile leaves out a page: 64 queries do not see its 64 keys."""
    read = [2 * tile.seen for tile in PROMPT.tiles]
    read[2] -= 1
    assert PROMPT.pairs(read) == PROMPT.dense_pairs - 64 * 64


def test_attention() -> None:
    pairs, rows = 1000, 200 * 4
    moved = 2 * rows * 8 * 2 + 4 * rows + 2 * 400 * 8 * 2 + 4 * (20 + 2 * 2 * 4)  # q and out; lse; K and V; index
    assert PROMPT.attention(pairs, 20) == Work(4 * 8 * 2 * 1000, moved)
    few = TOKENS.attention(2 * 3 * 66, 12)  # every key that is read is read once
    assert few == Work(4 * 8 * 2 * 396, 2 * 12 * 8 * 2 + 4 * 12 + 2 * 396 * 8 * 2 + 4 * (12 + 12))


def test_scores() -> None:
    q, masses, products = 200 * 4 * 8 * 2, 4 * 2 * 4 * 4, 4 * (64 * 1 + 64 * 2 + 8 * 3)
    assert PROMPT.page_scores() == Work(2 * 8 * products, q + 3 * 2 * 8 * 2 + masses)
    assert PROMPT.bound_scores(4) == Work(4 * 8 * 4 * products, q + 8 * 3 * 2 * 8 * 2 + masses)
    assert PROMPT.label_scores(2) == Work(2 * 2 * 64 * products, q + 3 * 2 * 64 * 2 * 2 + 64 * masses)
    assert PROMPT.gate_scores() == Work(2 * 8 * 2 * (1 + 2 + 3), 4 * 2 * 8 * 2 + 3 * 2 * 8 * 2 + masses)
    groups = 8 * 1 + 8 * 2 + 1 * 3  # of 8 queries, times past pages
    assert PROMPT.antidiagonal_scores(8) == Work(2 * 8 * 4 * 64 * groups, q + 64 * 3 * 2 * 8 * 2 + masses)
    assert TOKENS.page_scores().bytes == 12 * 8 * 2 + 3 * 2 * 2 * 8 * 2 + 4 * 2 * 3 * 3


def test_the_antidiagonals_of_a_long_prompt_cost_a_part_of_dense() -> None:
    """n^2 d / S per head: half of one in `stride` of dense attention."""
    long = Sizes(4, 2, 8, 2, 1, 2**16, tuple(Tile(first, 64) for first in range(0, 2**16, 64)))
    dense = long.attention(long.dense_pairs, 0).operations
    assert long.antidiagonal_scores(16).operations / dense == pytest.approx(1 / 32, rel=0.01)


def test_the_rest() -> None:
    pairs = sum(range(200 - 64 + 1, 201))
    assert PROMPT.probe(64) == Work(2 * 8 * 4 * pairs, (64 * 4 + 200 * 2) * 8 * 2 + 2 * 4 * 2 * 256)
    assert PROMPT.probe(999).operations == 2 * 8 * 4 * 200 * 201 // 2
    assert PROMPT.dropped_pages(10) == Work(4 * 8 * 2 * 10, 3 * 200 * 4 * 16 + 2 * 4 * 200 * 4 + 2 * 3 * 2 * 16)
    assert PROMPT.choose_pages() == Work(0, 2 * 4 * 4 * 5)
    assert PROMPT.choose_tokens(7) == Work(0, 4 * 2 * 4 * 256 + 4 * 2 * 4 * 7)
    assert PROMPT.build_index(9) == Work(0, 2 * 4 * 4 + 4 * (9 + 2 * 2 * 4))
    assert PROMPT.store() == Work(0, 2 * 2 * 200 * 2 * 8 * 2)
    assert PROMPT.summaries(1) == Work(0, 3 * 2 * (64 + 1) * 8 * 2)
    assert PROMPT.summaries(2, read=2) == Work(0, 3 * 2 * 4 * 8 * 2)


def test_the_roofline_is_the_slower_of_two() -> None:
    ceilings = Ceilings(operations=100.0, bandwidth=10.0)
    assert ceilings.seconds(Work(200, 10)) == 2.0
    assert ceilings.seconds(Work(200, 30)) == 3.0


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("prompt", [True, False])
def test_what_is_counted_is_what_is_asked(heads: tuple[int, int], prompt: bool) -> None:
    """The layer of noise: its dense index names every page, its sparse one fewer, and pages are in their places."""
    layer = Layer(Shape(*heads, 8, torch.float32, "cpu"), 1 if prompt else 3, 900)
    blocks = layer.prompts() if prompt else layer.newest()
    least = Sizes(*heads, 8, 4, layer.batch, 900, tuple(Tile(row.pos, row.count) for row in blocks.rows))
    assert least.pairs(layer.dense(blocks).count.sum(0).tolist()) == least.dense_pairs
    budget = Budget("share", 0.25) if prompt else Budget("tokens", 256)
    mask, index = layer.sparse(blocks, layer.masses(blocks), budget)
    assert 0.2 < least.pairs(index.count.sum(0).tolist()) / least.dense_pairs < 0.45
    assert mask.shape == (2, len(blocks), 15)
    k, v = layer.whole
    assert k.shape == v.shape == (layer.batch, 2, 900, 8)
    page = layer.kv.table[-1, 3]
    assert torch.equal(k[-1, :, 192:256], layer.kv.k[:, page]) and torch.equal(v[-1, :, 192:256], layer.kv.v[:, page])


def test_sequences_of_different_lengths() -> None:
    kv = paged(Shape(4, 2, 8, torch.float32, "cpu"), [130, 40])
    assert kv.table.shape == (2, 3) and sorted(kv.table.flatten().tolist()) == [-1, -1, 0, 1, 2, 3]
    assert kv.length.tolist() == [130, 40]
