"""The Triton kernels on a GPU against the definition in float64, in every type."""

import pytest
import torch
from kernel_cases import Case, check, make_case, reference

from gossamer.kernels.dense_prefill import Way, chunks, dense_prefill, faster_way, ways
from gossamer.kernels.layout import UNLIMITED, PagedKV
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.store import store, store_torch

pytestmark = pytest.mark.gpu

WINDOWS = ((0, UNLIMITED), (64, 256), (3, 70), (0, 100), (130, 1), (100, 65))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 32, 64])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("ratio", [1, 3, 4, 16])
def test_attention(dtype: torch.dtype, tile: int, dim: int, ratio: int) -> None:
    check_attention(dtype, tile, dim, ratio)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_attention_of_fp8(dtype: torch.dtype, tile: int, dim: int) -> None:
    check_attention(dtype, tile, dim, 4, fp8=True)


def check_attention(dtype: torch.dtype, tile: int, dim: int, ratio: int, *, fp8: bool = False) -> None:
    spans = [(130, 1 if tile == 1 else 170), (0, 1), (1000, 1 if tile == 1 else 3)]
    for density, tokens, windows, softcap in ((1.0, 0, (), 0.0), (0.4, 70, WINDOWS, 0.0), (0.5, 9, WINDOWS, 4.0)):
        case = make_case(
            spans, tile=tile, dim=dim, ratio=ratio, dtype=dtype, density=density, tokens=tokens, windows=windows,
            fp8=fp8,
        ).to("cuda")  # fmt: skip
        sinks = torch.randn(case.q.shape[1], device="cuda") if softcap else None
        out, lse = case.blank()
        kernel = paged_decode if tile == 1 else paged_prefill
        kernel(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale, softcap=softcap, sinks=sinks)
        check(out, lse, reference(case, softcap, sinks), dtype)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="older GPUs have no copy engine"
)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("options", [{}, {"per_sm": 2}, {"M": 128}])
def test_pages_through_descriptors(monkeypatch: pytest.MonkeyPatch, dim: int, options: dict[str, int]) -> None:
    dtype = torch.bfloat16
    form = pytest.importorskip("gossamer.kernels.triton.paged_prefill")
    monkeypatch.setattr(form, "tuned", lambda kernel, tile, device, **case: {**tile, "TMA": 1} | options)
    for density, tokens, windows in ((1.0, 0, ()), (0.4, 70, WINDOWS)):
        if tokens and options.get("M", 0) > form.tile(dim, 2, 128, tokens=True, capability=90)["M"]:
            continue  # more rows than there are registers for
        case = make_case(
            [(130, 170), (0, 1), (1000, 3)],
            tile=32, dim=dim, ratio=4, dtype=dtype, density=density, tokens=tokens, windows=windows,
        ).to("cuda")  # fmt: skip
        out, lse = case.blank()
        paged_prefill(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale)
        check(out, lse, reference(case), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("way", Way)
def test_others_take_chunks_that_read_everything(dtype: torch.dtype, dim: int, ratio: int, way: Way) -> None:
    spans = [(0, 300), (1000, 512), (63, 257)]
    case = make_case(spans, dim=dim, ratio=ratio, dtype=dtype).to("cuda")
    if way not in ways(case.q, case.kv):
        pytest.skip(f"{way} is not installed, or not for this GPU")
    out, lse = case.blank()
    for softcap in (0.0, 4.0) if way is not Way.TORCH else (0.0,):
        paged_prefill(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale, softcap=softcap)
        out.fill_(float("nan"))  # only its log-sum-exp was wanted
        for chunk, tiles in chunks(case.blocks):
            assert faster_way(case.q, case.kv, chunk) and chunk.count == spans[chunk.seq][1] and tiles
            dense_prefill(case.q, case.kv, chunk, out, scale=case.scale, softcap=softcap, way=way)
        check(out, lse, reference(case, softcap), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_does_not_depend_on_neighbours(dtype: torch.dtype) -> None:
    case = make_case([(past, 1) for past in (40, 600, 3000)], tile=1, dtype=dtype).to("cuda")
    together, lse = case.blank()
    paged_decode(case.q, case.kv, case.blocks, case.index, together, lse, scale=case.scale)
    for n, row in enumerate(case.blocks.rows):
        alone, _ = case.blank()
        blocks, index = case.only(n)
        paged_decode(case.q, case.kv, blocks, index, alone, lse, scale=case.scale)
        assert torch.equal(alone[row.token], together[row.token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 64])
def test_store(dtype: torch.dtype, tile: int) -> None:
    check_store(make_case([(60, 1 if tile == 1 else 200), (5, 1)], tile=tile, dtype=dtype, dim=80, heads=(0, 2)))


@pytest.mark.parametrize("tile", [1, 64])
def test_store_as_fp8(tile: int) -> None:
    spans = [(60, 1 if tile == 1 else 200), (5, 1)]
    check_store(make_case(spans, tile=tile, dtype=torch.bfloat16, dim=80, heads=(0, 2), fp8=True))


def check_store(case: Case) -> None:
    dtype = case.q.dtype
    k, v = (torch.randn(5, case.q.shape[0], 80, dtype=dtype).transpose(0, 1) for _ in range(2))
    there = case.to("cuda")
    store(k.cuda(), v.cuda(), there.kv, there.blocks)
    store_torch(k, v, case.kv, case.blocks)
    written = [(there.kv.k, case.kv.k), (there.kv.v, case.kv.v)]
    if there.kv.scale is not None and case.kv.scale is not None:
        written = [(mine.view(torch.uint8), theirs.view(torch.uint8)) for mine, theirs in written]
        written.append((there.kv.scale, case.kv.scale))
    for mine, theirs in written:
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


def test_offsets_beyond_32_bits() -> None:
    """A page whose elements lie more than 2**31 from the pool's beginning."""
    pages, dim = 2**31 // (64 * 128) + 8, 128
    pool = torch.zeros(1, pages, 64, dim, dtype=torch.bfloat16, device="cuda")
    case = make_case([(0, 100)], tile=64, heads=(0,), dtype=torch.bfloat16, dim=dim).to("cuda")
    table = case.kv.table + (pages - case.kv.k.shape[1])
    k, v = pool, torch.zeros_like(pool)
    k[:, -case.kv.k.shape[1] :], v[:, -case.kv.v.shape[1] :] = case.kv.k, case.kv.v
    old = case.kv
    kv = PagedKV(k, v, table, old.length, old.heads, old.sink, old.window, old.ratio)
    out, lse = case.blank()
    paged_prefill(case.q, kv, case.blocks, case.index, out, lse, scale=case.scale)
    check(out, lse, reference(case), torch.bfloat16)
