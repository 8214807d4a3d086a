"""store and compact: the torch forms against what they are defined to do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import make_case

from gossamer.kernels.compact import compact, compact_tokens
from gossamer.kernels.layout import QueryBlocks
from gossamer.kernels.store import store


@pytest.mark.parametrize("tile", [1, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_writes_each_token_to_its_place_and_nothing_else(tile: int, dtype: torch.dtype) -> None:
    spans = [(past, 1 if tile == 1 else new) for past, new in ((0, 1), (63, 90), (64, 64), (127, 2), (500, 30))]
    case = make_case(spans, tile=tile, heads=(3, 0), layer_heads=4, dtype=dtype, dim=32)
    new_k, new_v = (torch.randn(4, case.q.shape[0], 32, dtype=dtype).transpose(0, 1) for _ in range(2))
    expected_k, expected_v = case.kv.k.clone(), case.kv.v.clone()
    for row in case.blocks.rows:
        for i in range(row.count):
            physical, offset = int(case.kv.table[row.seq, (row.pos + i) // 64]), (row.pos + i) % 64
            for g, head in enumerate((3, 0)):
                expected_k[g, physical, offset] = new_k[row.token + i, head]
                expected_v[g, physical, offset] = new_v[row.token + i, head]
    store(new_k, new_v, case.kv, case.blocks)
    for found, expected in ((case.kv.k, expected_k), (case.kv.v, expected_v)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_store_of_nothing_changes_nothing() -> None:
    case = make_case([(0, 10)])
    before = case.kv.k.clone()
    store(torch.randn(0, 2, 64), torch.randn(0, 2, 64), case.kv, QueryBlocks.of(64, []))
    torch.testing.assert_close(case.kv.k, before, rtol=0, atol=0, equal_nan=True)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))


@settings(max_examples=30)
@given(sizes, st.floats(0, 1), st.integers(0, 2**31))
def test_compact_lists_the_set_columns_of_each_row(size: tuple[int, int, int], share: float, seed: int) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
    start, count, pages = compact(mask)
    assert start.dtype == count.dtype == pages.dtype == torch.int32 and pages.numel() == mask.numel()
    for g in range(size[0]):
        for n in range(size[1]):
            run = pages[start[g, n] : start[g, n] + count[g, n]]
            assert run.tolist() == [page for page in range(size[2]) if mask[g, n, page]]


@settings(max_examples=30)
@given(sizes, st.integers(0, 2**31))
def test_compact_tokens_drops_the_padding(size: tuple[int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5000, size, generator=generator).sort(-1).values.int()
    tokens[torch.rand(size, generator=generator) < 0.4] = -1
    start, count, packed = compact_tokens(tokens)
    assert start.dtype == count.dtype == packed.dtype == torch.int32
    for g in range(size[0]):
        for n in range(size[1]):
            run = packed[start[g, n] : start[g, n] + count[g, n]]
            assert run.tolist() == [t for t in tokens[g, n].tolist() if t >= 0]


def test_compact_takes_views() -> None:
    mask = (torch.rand(7, 3, 4) < 0.5).permute(1, 2, 0)
    start, count, pages = compact(mask)
    assert int(count.sum()) == int(mask.sum()) and start.shape == (3, 4)
    assert pages[: int(count[0, 0])].tolist() == mask[0, 0].nonzero().flatten().tolist()
