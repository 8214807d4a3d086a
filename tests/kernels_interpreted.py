"""The Triton kernels under Triton's interpreter, against their torch forms. test_kernels_triton.py runs this file in a
process of its own, because TRITON_INTERPRET has to be set before Triton is imported."""

import os
from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, make_case, reference
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer.kernels.layout import UNLIMITED, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode_torch
from gossamer.kernels.paged_prefill import paged_prefill_torch
from gossamer.kernels.store import store_torch
from gossamer.kernels.triton import page_loads, paged_decode, paged_prefill, store

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_triton.py runs this file"

WINDOWS = ((0, UNLIMITED), (64, 256), (3, 70), (0, 100), (100, 65))
SPANS = [(130, 70), (0, 40), (300, 3)]
# The interpreter computes bfloat16 products wrongly without a word: float32 and float16 only.
DTYPES = {torch.float32: 1e-5, torch.float16: 1e-3}
PLAIN: dict[str, object] = {"ratio": 2, "dim": 32}
ODD: dict[str, object] = {"ratio": 3, "dim": 80, "tokens": 70, "density": 0.4, "windows": WINDOWS, "heads": (0, 2)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("tile", [1, 32])
def test_attention(dtype: torch.dtype, options: dict[str, object], softcap: float, with_sinks: bool, tile: int) -> None:
    spans = [(past, 1 if tile == 1 else new) for past, new in SPANS] + ([(1100, 1)] if tile == 1 else [])
    case = make_case(spans, tile=tile, dtype=dtype, seed=1, **options)  # type: ignore[arg-type]
    sinks = torch.randn(case.q.shape[1]) if with_sinks else None
    launch, twin = (
        (paged_decode.launch, paged_decode_torch) if tile == 1 else (paged_prefill.launch, paged_prefill_torch)
    )
    results = []
    for kernel in (launch, twin):
        out, lse = case.blank()
        kernel(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale, softcap=softcap, sinks=sinks)
        results.append((out, lse))
    tolerance = DTYPES[dtype]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance, equal_nan=True)
    due = ~reference(case, softcap, sinks)[1].isnan()
    assert results[0][0][due].isfinite().all() and results[0][0][~due].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "options", "fit"),
    [
        (torch.float16, ODD | {"heads": (0, 1, 2)}, True),
        (torch.float16, {"dim": 32, "ratio": 4}, True),
        (torch.float16, {"dim": 36}, False),  # rows of 72 bytes
        (torch.float32, {"dim": 32}, False),
    ],
)
def test_pages_through_descriptors(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, object], fit: bool
) -> None:
    """By those that fit, of a slice of a pool's heads; what lies behind a sequence's last token is never a number."""
    made: list[PagedKV] = []

    def noted(kv: PagedKV, wide: int) -> tuple[TensorDescriptor, TensorDescriptor]:
        made.append(kv)
        return page_loads.page_descriptors(kv, wide)

    monkeypatch.setattr(paged_prefill, "tuned", lambda kernel, tile, device, **case: {**tile, "TMA": 1, "per_sm": 2})
    monkeypatch.setattr(paged_prefill, "page_descriptors", noted)
    case = make_case(SPANS, tile=32, dtype=dtype, seed=1, **options)  # type: ignore[arg-type]
    kv, index = case.kv.only(slice(1, None)), case.index.only(slice(1, None), None)
    results = []
    for kernel in (paged_prefill.launch, paged_prefill_torch):
        out, lse = case.blank()
        kernel(case.q, kv, case.blocks, index, out, lse, scale=case.scale)
        results.append((out, lse))
    assert len(made) == fit
    assert not results[0][1].isnan().all()
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=DTYPES[dtype], rtol=DTYPES[dtype], equal_nan=True)


@pytest.mark.parametrize("least", [1, 2])
def test_decode_cuts_long_runs_into_as_many_pieces(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    """Five pages beside twenty, all of whose pieces are longer than the shortest."""
    monkeypatch.setattr(paged_decode, "LEAST_PAGES", least)
    monkeypatch.setattr(paged_decode, "MOST_PIECES", 4)
    spans = [(1250, 1), (10, 1), (330, 1), (700, 1)]
    case = make_case(spans, tile=1, tokens=200, density=0.6, dim=32, windows=WINDOWS, seed=least)
    check_decode(case)


def check_decode(case: Case) -> None:
    out, lse = case.blank()
    paged_decode.launch(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale)
    expected, expected_lse = reference(case)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_decode_gives_nothing_to_places_without_a_query() -> None:
    case = make_case([(130, 1), (600, 1)], tile=1, dim=32)
    free = BlockRow(1, case.q.shape[0] - 1, 0, 0)
    index = case.index
    runs = (torch.nn.functional.pad(x, (0, 1)) for x in (index.start, index.count))
    blocks = QueryBlocks.of(1, [*case.blocks.rows, free])
    padded = replace(case, blocks=blocks, index=SparseIndex(*runs, index.pages))
    expected, _ = reference(case)
    out, lse = case.blank()
    paged_decode.launch(case.q, case.kv, padded.blocks, padded.index, out, lse, scale=case.scale)
    expected[free.token] = 0
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 7, 1500])
def test_list_of_pieces(rows: int) -> None:
    """Every page and token of every row lies in one piece, more than 1024 rows included."""
    page, least, most, heads = 64, 3, 8, 1 if rows % 2 else 2
    gen = torch.Generator().manual_seed(rows)
    pages = torch.randint(0, 60, (heads, rows // heads), generator=gen, dtype=torch.int32)
    tokens = torch.randint(0, 900, pages.shape, generator=gen, dtype=torch.int32)
    tokens[torch.rand(tokens.shape, generator=gen) < 0.3] = 0
    items = torch.full((paged_decode.most_items(rows, 10**6),), -1, dtype=torch.int32)
    first = torch.full((rows + 1,), -1, dtype=torch.int32)
    paged_decode._list_pieces[(rows,)](
        pages, tokens, items, first, *(2 * [rows // heads]), rows // heads, rows, page, least, most, True
    )
    expected, begins = [], [0]
    for row, (n, m) in enumerate(zip(pages.flatten().tolist(), tokens.flatten().tolist(), strict=True)):
        size = max(least, -(-(n + -(-m // page)) // most))
        pieces = -(-n // size) + -(-m // (size * page))
        assert pieces <= most + 1
        expected += [row * 2 * most + piece for piece in range(pieces)]
        begins.append(len(expected))
    assert first.tolist() == begins and items[: len(expected)].tolist() == expected
    assert (items[len(expected) :] == -1).all()


@pytest.mark.parametrize("ratio", [1, 16])
def test_more_packed_rows_than_a_program_takes(ratio: int) -> None:
    case = make_case([(60, 40)], tile=32, ratio=ratio, dim=32, heads=(0,))
    out, lse = case.blank()
    paged_prefill.launch(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale)
    expected, expected_lse = reference(case)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("tile", [1, 24])
def test_store(tile: int) -> None:
    case = make_case([(past, 1 if tile == 1 else new) for past, new in SPANS], tile=tile, dim=80, heads=(0, 2))
    k, v = (torch.randn(case.q.shape[0], 5, 80).transpose(0, 1).contiguous().transpose(0, 1) for _ in range(2))
    pools = []
    for kernel in (store.launch, store_torch):
        old = case.kv
        kv = PagedKV(old.k.clone(), old.v.clone(), old.table, old.length, old.heads, old.sink, old.window, old.ratio)
        kernel(k, v, kv, case.blocks)
        pools.append(torch.stack((kv.k, kv.v)))
    assert not torch.equal(pools[0].nan_to_num(), torch.stack((case.kv.k, case.kv.v)).nan_to_num())
    torch.testing.assert_close(pools[0], pools[1], rtol=0, atol=0, equal_nan=True)
