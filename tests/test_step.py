"""A step's tiles: cut at the same places of a sequence, however its tokens are spread over steps."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.attention.policy import dense_policy
from gossamer.attention.step import TILE_ROWS, Span, Step, plan_step
from gossamer.kernels.layout import BlockRow
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll

CACHE = KVCache(group_heads([["all"]]), [64], ratio=1, head_dim=1, dtype=torch.float32)
POINT = dense_policy(1, 1).points[0]

RATIOS = st.sampled_from([1, 2, 4, 5, 8, 64, 200])
SPANS = st.lists(st.builds(Span, st.integers(0, 300), st.integers(1, 300), st.integers(1, 500)), min_size=1, max_size=5)


def plan(spans: list[Span], ratio: int) -> Step:
    tables = [CACHE.table([KeepAll()], b"") for _ in spans]
    for table, span in zip(tables, spans, strict=True):
        CACHE.grow(table, span.first + span.new)
    views = CACHE.views(tables)
    for table in tables:
        CACHE.drop(table)
    return plan_step(spans, views, [POINT] * len(spans), ratio)


def tiles(step: Step) -> list[BlockRow]:
    return [row for blocks in step.blocks for row in blocks.rows]


@given(spans=SPANS, ratio=RATIOS)
def test_tiles_cover_every_new_token_once(spans: list[Span], ratio: int) -> None:
    step = plan(spans, ratio)
    assert step.num_tokens == sum(span.new for span in spans)
    covered = sorted((row.token + i, row.seq, row.pos + i) for row in tiles(step) for i in range(row.count))
    laid_out = [(seq, span.first + i) for seq, span in enumerate(spans) for i in range(span.new)]
    assert covered == [(token, *where) for token, where in enumerate(laid_out)]


@given(spans=SPANS, ratio=RATIOS)
def test_prompt_and_generated_positions_are_kept_apart(spans: list[Span], ratio: int) -> None:
    """A span may hold both: after a preemption, generated tokens are computed again together with the prompt."""
    step = plan(spans, ratio)
    if step.prefill is not None:
        assert step.prefill.size == max(1, TILE_ROWS // ratio)
        for row in step.prefill.rows:
            assert row.pos + row.count <= spans[row.seq].prompt
            assert row.pos // step.prefill.size == (row.pos + row.count - 1) // step.prefill.size
    if step.decode is not None:
        assert step.decode.size == 1
        assert all(row.count == 1 and row.pos >= spans[row.seq].prompt for row in step.decode.rows)
    kinds = {True: step.prefill is not None, False: step.decode is not None}
    for kind, present in kinds.items():
        assert present == any((p < s.prompt) == kind for s in spans for p in range(s.first, s.first + s.new))


@given(
    length=st.integers(1, 600),
    prompt=st.integers(1, 600),
    cuts=st.lists(st.integers(1, 599), max_size=8),
    ratio=RATIOS,
)
def test_tiles_are_cut_at_the_same_places_whatever_the_chunks(
    length: int, prompt: int, cuts: list[int], ratio: int
) -> None:
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    whole: dict[tuple[int, int], set[int]] = {}
    for row in tiles(step := plan([Span(0, length, prompt)], ratio)):
        whole[row.count, row.pos] = set(range(row.pos, row.pos + row.count))
    for first, stop in itertools.pairwise(edges):
        part = plan([Span(first, stop - first, prompt)], ratio)
        for row in tiles(part):
            positions = set(range(row.pos, row.pos + row.count))
            assert any(positions <= tile for tile in whole.values()), "a chunk's tile lies in two tiles of the whole"
        for chunk, full in ((part.prefill, step.prefill), (part.decode, step.decode)):
            if chunk is not None:
                assert full is not None
                assert set(chunk.origin.tolist()) <= set(full.origin.tolist())


def test_the_device_has_what_the_host_has() -> None:
    step = plan([Span(100, 70, 160), Span(5, 1, 5)], 2)
    assert step.prefill is not None and step.decode is not None
    assert step.prefill.rows == (BlockRow(0, 0, 100, 28), BlockRow(0, 28, 128, 32))
    assert step.decode.rows == (*(BlockRow(0, 60 + i, 160 + i, 1) for i in range(10)), BlockRow(1, 70, 5, 1))
    for blocks in step.blocks:
        columns = (blocks.seq, blocks.token, blocks.pos, blocks.count)
        assert torch.stack(columns, 1).tolist() == [list(row) for row in blocks.rows]


@pytest.mark.parametrize("ratio", [1, 3, 128, 500])
def test_a_tile_holds_at_most_its_rows(ratio: int) -> None:
    step = plan([Span(0, 300, 300)], ratio)
    assert step.decode is None and step.prefill is not None
    assert max(row.count for row in step.prefill.rows) == max(1, TILE_ROWS // ratio)
