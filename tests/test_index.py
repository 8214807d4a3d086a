"""The index: what no query may lack is added, what it may not see is removed; against sets built query by query."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import run_interpreted
from torch import Tensor

from gossamer.attention.index import build_index
from gossamer.attention.selectors import Proposal
from gossamer.kernels.layout import NULL_PAGE, UNLIMITED, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.runs import list_pages, list_tokens, readable_runs, readable_runs_torch

SIZE = 4  # tokens of a page
LENGTH = 40  # tokens of the longest sequence
PAGES = LENGTH // SIZE


@dataclass(frozen=True)
class Situation:
    """Some sequences, some of whose pages are gone, and what a selector proposes for their query blocks."""

    lengths: list[int]
    released: list[set[int]]  # per sequence
    rules: list[list[tuple[int, int]]]  # [sequence][head], sink and window
    tile: int
    rows: list[BlockRow]
    pages: list[list[set[int]]]  # [head][block]
    tokens: list[list[list[int]]] | None

    @property
    def kv(self) -> PagedKV:
        heads, count = len(self.rules[0]), len(self.lengths)
        table = torch.full((count, PAGES), NULL_PAGE, dtype=torch.int32)
        for seq, length in enumerate(self.lengths):
            for page in set(range(-(-length // SIZE))) - self.released[seq]:
                table[seq, page] = seq * PAGES + page
        pool = torch.zeros(heads, count * PAGES, SIZE, 1)
        sink, window = (torch.tensor([[rule[i] for rule in row] for row in self.rules]).int() for i in (0, 1))
        return PagedKV(pool, pool, table, torch.tensor(self.lengths).int(), torch.arange(heads).int(), sink, window, 1)

    @property
    def blocks(self) -> QueryBlocks:
        return QueryBlocks.of(self.tile, self.rows)

    @property
    def proposal(self) -> Proposal:
        shape = len(self.rules[0]), len(self.rows)
        pages = torch.zeros(*shape, PAGES, dtype=torch.bool)
        for head, per_block in enumerate(self.pages):
            for block, chosen in enumerate(per_block):
                pages[head, block, sorted(chosen)] = True
        if self.tokens is None:
            return Proposal(pages)
        width = max(1, *(len(chosen) for per_block in self.tokens for chosen in per_block))
        tokens = torch.full((*shape, width), -1, dtype=torch.int32)
        for head, per_token in enumerate(self.tokens):
            for block, some in enumerate(per_token):
                tokens[head, block, : len(some)] = torch.tensor(some, dtype=torch.int32)
        return Proposal(pages, tokens)

    def right(self, head: int, block: int) -> tuple[list[int], list[int]]:
        """The pages and tokens of one run, from what each single query may see."""
        row = self.rows[block]
        sink, window = self.rules[row.seq][head]
        seen: set[int] = set()
        for pos in range(row.pos, row.pos + row.count):
            seen |= {j for j in range(pos + 1) if j > pos - window or j < sink}
        seen -= {j for j in seen if j // SIZE in self.released[row.seq]}
        origin = row.pos // self.tile * self.tile
        own = set(range(origin // SIZE, (row.pos + row.count - 1) // SIZE + 1))
        pages = sorted(page for page in self.pages[head][block] | own | {0} if page in {j // SIZE for j in seen})
        if self.tokens is None:
            return pages, []
        return pages, sorted({j for j in self.tokens[head][block] if j in seen and j // SIZE not in pages})


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    heads, tile = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4, 6, 16]))
    lengths = draw(st.lists(st.integers(1, LENGTH), min_size=1, max_size=2))
    rules = st.sampled_from([(0, UNLIMITED), (0, 5), (3, 6), (4, 1), (9, 14)])
    rule = [draw(st.lists(rules, min_size=heads, max_size=heads)) for _ in lengths]
    rows, released = [], []
    for seq, length in enumerate(lengths):
        pos = first = draw(st.integers(0, length - 1))
        while pos < length:
            end = min(pos // tile * tile + tile, length)
            rows.append(BlockRow(seq, len(rows) * tile, pos, end - pos))
            pos = end
        # Only what no head's later query may see was released, as the cache does it.
        kept = {
            j // SIZE
            for pos in range(first, length)
            for s, w in rule[seq]
            for j in range(pos + 1)
            if j > pos - w or j < s
        }
        released.append(set(range(-(-length // SIZE))) - kept - (set() if draw(st.booleans()) else set(range(PAGES))))
    page_sets = st.sets(st.integers(0, PAGES - 1))
    token_lists = st.lists(st.integers(-1, LENGTH - 1), max_size=8).map(sorted)

    def per_run(values: st.SearchStrategy[list[int]] | st.SearchStrategy[set[int]]) -> list[list[list[int] | set[int]]]:
        return [[draw(values) for _ in rows] for _ in range(heads)]

    tokens = per_run(token_lists) if draw(st.booleans()) else None
    return Situation(lengths, released, rule, tile, rows, per_run(page_sets), tokens)


def runs(index: SparseIndex, head: int, block: int) -> tuple[list[int], list[int]]:
    first, count = int(index.start[head, block]), int(index.count[head, block])
    pages = index.pages[first : first + count].tolist()
    if index.tokens is None or index.token_start is None or index.token_count is None:
        return pages, []
    first, count = int(index.token_start[head, block]), int(index.token_count[head, block])
    return pages, index.tokens[first : first + count].tolist()


@given(situations())
def test_index_is_safe_and_complete(situation: Situation) -> None:
    """Sink page, own pages, no future, no released page, the window; single tokens once, and only outside the pages."""
    index = build_index(situation.proposal, situation.kv, situation.blocks)
    for head in range(len(situation.rules[0])):
        for block in range(len(situation.rows)):
            assert runs(index, head, block) == situation.right(head, block)


def one_block(row: BlockRow, *, tile: int = 4, rule: tuple[int, int] = (0, UNLIMITED)) -> Situation:
    return Situation([LENGTH], [set()], [[rule]], tile, [row], [[set()]], [[[]]])


def test_nothing_proposed_leaves_the_first_page_and_the_own_ones() -> None:
    """Own pages begin at the tile's origin, so that a chunk border inside the tile does not change them."""
    situation = one_block(BlockRow(0, 0, 30, 2), tile=16)
    assert runs(build_index(situation.proposal, situation.kv, situation.blocks), 0, 0) == ([0, 4, 5, 6, 7], [])


def test_first_page_is_left_out_where_the_window_ends_before_it() -> None:
    situation = one_block(BlockRow(0, 0, 30, 1), tile=1, rule=(0, 8))
    assert runs(build_index(situation.proposal, situation.kv, situation.blocks), 0, 0) == ([7], [])


def test_tokens_that_do_not_ascend_are_not_read() -> None:
    """A selector that gets order wrong reads less; a key that were read twice would count twice in the softmax."""
    situation = one_block(BlockRow(0, 0, 30, 1), tile=1)
    tokens = torch.tensor([[[5, -1, 5, 9, 6, 9, 39, 12, 28, 2]]], dtype=torch.int32)
    index = build_index(Proposal(situation.proposal.pages, tokens), situation.kv, situation.blocks)
    assert runs(index, 0, 0) == ([0, 7], [5, 9])


def test_tokens_behind_the_table_are_no_tokens() -> None:
    situation = one_block(BlockRow(0, 0, 30, 1), tile=1)
    tokens = torch.tensor([[[5, LENGTH, 10**6]]], dtype=torch.int32)
    index = build_index(Proposal(situation.proposal.pages, tokens), situation.kv, situation.blocks)
    assert runs(index, 0, 0) == ([0, 7], [5])


def test_no_tokens_to_choose_from() -> None:
    situation = one_block(BlockRow(0, 0, 30, 1), tile=1)
    tokens = torch.empty(1, 1, 0, dtype=torch.int32)
    index = build_index(Proposal(situation.proposal.pages, tokens), situation.kv, situation.blocks)
    assert runs(index, 0, 0) == ([0, 7], [])


sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))


@settings(max_examples=30)
@given(sizes, st.floats(0, 1), st.integers(0, 2**31))
def test_lists_of_the_set_columns_of_each_row(size: tuple[int, int, int], share: float, seed: int) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
    start, count, pages = list_pages(mask)
    assert start.dtype == count.dtype == pages.dtype == torch.int32 and pages.numel() == mask.numel()
    for g in range(size[0]):
        for n in range(size[1]):
            run = pages[start[g, n] : start[g, n] + count[g, n]]
            assert run.tolist() == [page for page in range(size[2]) if mask[g, n, page]]


@settings(max_examples=30)
@given(sizes, st.integers(0, 2**31))
def test_lists_without_the_padding(size: tuple[int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5000, size, generator=generator).sort(-1).values.int()
    tokens[torch.rand(size, generator=generator) < 0.4] = -1
    start, count, packed = list_tokens(tokens)
    assert start.dtype == count.dtype == packed.dtype == torch.int32
    for g in range(size[0]):
        for n in range(size[1]):
            run = packed[start[g, n] : start[g, n] + count[g, n]]
            assert run.tolist() == [t for t in tokens[g, n].tolist() if t >= 0]


def test_lists_of_views() -> None:
    mask = (torch.rand(7, 3, 4) < 0.5).permute(1, 2, 0)
    start, count, pages = list_pages(mask)
    assert int(count.sum()) == int(mask.sum()) and start.shape == (3, 4)
    assert pages[: int(count[0, 0])].tolist() == mask[0, 0].nonzero().flatten().tolist()


def random_selection(width: int, tile: int, most: int, seed: int) -> tuple[Tensor, Tensor | None, PagedKV, QueryBlocks]:
    """Pages and tokens for two heads of three sequences, some of whose pages are gone; tokens are not all in order."""
    gen = torch.Generator().manual_seed(seed)
    table = torch.arange(3 * width, dtype=torch.int32).view(3, width)
    table[1:, :] = torch.where(torch.rand(2, width, generator=gen) < 0.3, NULL_PAGE, table[1:])
    sink, window = (
        torch.tensor([[0, 0], [5, 9], [0, 3]]).int(),
        torch.tensor([[UNLIMITED, 7], [20, 1], [40, 10**6]]).int(),
    )
    rows = []
    for seq, length in enumerate((width * SIZE, max(1, width * SIZE - 6), width * SIZE // 2 + 1)):
        for pos in {0, length // 2, length - 1}:
            rows.append(BlockRow(seq, len(rows) * tile, pos, min(pos // tile * tile + tile, length) - pos))
    blocks = QueryBlocks.of(tile, [*rows, BlockRow(0, 0, 0, 0)])  # the last as a recorded step pads itself
    pool = torch.zeros(2, 1, SIZE, 1)
    kv = PagedKV(pool, pool, table, sink[:, 0], torch.arange(2).int(), sink, window, 1)
    pages = torch.rand(2, len(blocks), width, generator=gen) < 0.3
    tokens = torch.randint(-1, width * SIZE + 3, (2, len(blocks), most), generator=gen, dtype=torch.int32)
    return (
        pages,
        torch.where(torch.rand(tokens.shape, generator=gen) < 0.2, tokens, tokens.sort(-1).values) if most else None,
        kv,
        blocks,
    )


def check_runs(mine: SparseIndex, theirs: SparseIndex) -> None:
    assert (mine.tokens is None) == (theirs.tokens is None)
    for head in range(theirs.count.shape[0]):
        for block in range(theirs.count.shape[1]):
            assert runs(mine, head, block) == runs(theirs, head, block)


def test_triton_under_the_interpreter() -> None:
    run_interpreted("runs_interpreted.py")


@pytest.mark.gpu
@pytest.mark.parametrize("most", [0, 50, 3000])
@pytest.mark.parametrize("width", [1, 60, 5000])
def test_on_a_gpu(width: int, most: int) -> None:
    for tile in (1, 24):
        pages, tokens, kv, blocks = random_selection(width, tile, most, width)
        right = readable_runs_torch(pages, tokens, kv, blocks)
        there = PagedKV(*(x.cuda() for x in (kv.k, kv.v, kv.table, kv.length, kv.heads, kv.sink, kv.window)), kv.ratio)
        given = QueryBlocks.of(tile, blocks.rows, "cuda")
        check_runs(readable_runs(pages.cuda(), None if tokens is None else tokens.cuda(), there, given), right)
        shared = pages[:1].cuda().expand(2, -1, -1)  # as a selector proposes that does not look at heads
        right = readable_runs_torch(pages[:1].expand(2, -1, -1), tokens, kv, blocks)
        check_runs(readable_runs(shared, None if tokens is None else tokens.cuda(), there, given), right)
