"""The attention kernels as a CPU runs them, and what they mean in torch, against the definition in float64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import Case, check, make_case, reference

from gossamer.kernels import cpu_gathered
from gossamer.kernels.layout import NULL_PAGE, UNLIMITED, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode, paged_decode_torch
from gossamer.kernels.paged_prefill import paged_prefill

WINDOWS = ((0, UNLIMITED), (64, 256), (3, 70), (0, 100), (130, 1), (0, 64), (100, 65))


def run(case: Case, softcap: float = 0.0, sinks: torch.Tensor | None = None) -> None:
    kernels = (paged_decode, paged_decode_torch) if case.blocks.size == 1 else (paged_prefill,)
    right = reference(case, softcap, sinks)
    for kernel in kernels:
        out, lse = case.blank()
        kernel(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale, softcap=softcap, sinks=sinks)
        check(out, lse, right, case.q.dtype)


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130, 1000])
def test_prefill_of_one_sequence_at_every_length(length: int, density: float) -> None:
    run(make_case([(0, length)], density=density))


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130, 1000])
def test_decode_of_one_sequence_at_every_length(length: int, density: float) -> None:
    run(make_case([(length - 1, 1)], tile=1, density=density))


@pytest.mark.parametrize(("past", "new"), [(1, 1), (63, 2), (64, 64), (100, 300), (511, 65), (700, 10), (704, 300)])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_chunks_anywhere(past: int, new: int, density: float) -> None:
    run(make_case([(past, new)], density=density, tile=32))


@pytest.mark.parametrize("tile", [8, 16, 43, 64, 128])
def test_tiles_of_every_size(tile: int) -> None:
    run(make_case([(150, 200)], density=0.5, tile=tile, tokens=20))


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("tile", [1, 16])
def test_grouped_query_ratios(ratio: int, tile: int) -> None:
    for density in (1.0, 0.5):
        run(make_case([(199, 1), (700, 1 if tile == 1 else 40)], ratio=ratio, tile=tile, density=density))


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("tile", [1, 32])
def test_head_sizes(dim: int, tile: int) -> None:
    for density in (1.0, 0.5):
        run(make_case([(640, 1 if tile == 1 else 70)], dim=dim, tile=tile, density=density, tokens=9))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tile", [1, 32, 64])
def test_windows_and_sinks_are_exact_to_the_token(tile: int, seed: int) -> None:
    new = 1 if tile == 1 else 150
    spans = [(640, new), (70, 1 if tile == 1 else 3), (1000, new)]
    run(
        make_case(
            spans, tile=tile, windows=WINDOWS, heads=(0, 2, 3), density=(1.0, 0.6)[seed % 2], seed=seed, tokens=30
        )
    )


@pytest.mark.parametrize("rule", WINDOWS)
@pytest.mark.parametrize("tile", [1, 64])
def test_one_rule_for_all_heads(tile: int, rule: tuple[int, int]) -> None:
    run(make_case([(900, 1 if tile == 1 else 400)], tile=tile, windows=[rule], shuffled=False))


@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_softcap_and_attention_sinks(tile: int, density: float) -> None:
    spans = [(600, 1 if tile == 1 else 200), (30, 1 if tile == 1 else 30)]
    case = make_case(spans, tile=tile, density=density, tokens=10, windows=WINDOWS[:3], seed=5)
    case.q.mul_(3)
    sinks = torch.randn(case.q.shape[1])
    for softcap, given in itertools.product((0.0, 2.0), (None, sinks, sinks - 50, sinks + 10)):
        run(case, softcap, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_half_precision_against_float64(dtype: torch.dtype, tile: int, density: float) -> None:
    spans = [(1500, 1 if tile == 1 else 300), (60, 1 if tile == 1 else 60)]
    run(make_case(spans, tile=tile, dtype=dtype, density=density, tokens=10, shuffled=False))


@pytest.mark.parametrize("tile", [1, 64])
def test_many_sequences_in_one_call(tile: int) -> None:
    spans = [(past, 1 if tile == 1 else 1 + past % 90) for past in (0, 1, 62, 63, 64, 500, 511, 512, 513, 700, 1400)]
    for same_heads, shuffled in itertools.product((False, True), (False, True)):
        run(make_case(spans, tile=tile, heads=(1, 2, 4), layer_heads=6, same_heads=same_heads, shuffled=shuffled))


@pytest.mark.parametrize("tile", [1, 64])
def test_own_pages_and_single_tokens_before_them(tile: int) -> None:
    """A run without gaps that is not all there is to read."""
    run(make_case([(800, 1 if tile == 1 else 300)], tile=tile, density=0.0, tokens=200))


@pytest.mark.parametrize("windows", [(), WINDOWS])
def test_many_short_sequences_are_read_together(windows: tuple[tuple[int, int], ...]) -> None:
    spans = [(past, 1) for past in (0, 1, 5, 30, 62, 63, 64, 100, 126, 127, 128, 700)]
    run(make_case(spans, tile=1, ratio=3, windows=windows, seed=4))


def test_everything_selected_equals_plain_attention() -> None:
    case = make_case([(0, 1000)], heads=(0, 1, 2), ratio=4)
    out, lse = case.blank()
    paged_prefill(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale)
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q[1:1001].double(), case.keys[0], case.values[0]))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
    torch.testing.assert_close(out[1:1001].double(), plain.transpose(0, 1), atol=2e-6, rtol=2e-6)


def padded(count: int) -> int:
    """What padded_width means, for one."""
    if count <= 8:
        return 1 << max(0, count - 1).bit_length()
    step = 1 << (count.bit_length() - 4)
    return -(-count // step) * step


def test_widths_are_padded_by_an_eighth_at_most() -> None:
    for count in range(1, 3000):
        width = padded(count)
        assert width == int(cpu_gathered.padded_width(torch.tensor([count]))[0])
        assert count <= width <= max(2 * count - 1, 1) and (count <= 8 or width <= count * 9 / 8)
    assert len({padded(count) for count in range(1, 1025)}) == 4 + 8 * 7


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many for torch, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("tokens", [0, 50, 2100])
def test_runs_of_many_pieces_on_any_number_of_threads(threads: int, tokens: int, softcap: float) -> None:
    """Whatever a piece sees of its run: also nothing, or a part of a page; and never another's result."""
    spans = [(700, 1), (2990, 1), (130, 1), (4000, 1)]
    case = make_case(spans, tile=1, density=0.3, tokens=tokens, windows=((0, UNLIMITED), (70, 300)), ratio=5)
    run(case, softcap, torch.randn(case.q.shape[1], generator=torch.Generator().manual_seed(0)))
    together, lse = case.blank()
    paged_decode(case.q, case.kv, case.blocks, case.index, together, lse, scale=case.scale, softcap=softcap)
    torch.set_num_threads(3)
    for n, row in enumerate(case.blocks.rows):
        alone, _ = case.blank()
        paged_decode(case.q, case.kv, *case.only(n), alone, lse, scale=case.scale, softcap=softcap)
        assert torch.equal(alone[row.token], together[row.token])


@pytest.mark.parametrize(("density", "same_heads"), [(1.0, False), (0.6, False), (0.6, True)])
def test_a_result_does_not_depend_on_its_neighbours(density: float, same_heads: bool) -> None:
    spans = [(past, 1) for past in (40, 90, 300, 450, 900, 2000, 2300, 2700)]
    case = make_case(spans, tile=1, dtype=torch.bfloat16, density=density, same_heads=same_heads, ratio=4)
    together, lse = case.blank()
    paged_decode(case.q, case.kv, case.blocks, case.index, together, lse, scale=case.scale)
    for n, row in enumerate(case.blocks.rows):
        alone, _ = case.blank()
        blocks, index = case.only(n)
        paged_decode(case.q, case.kv, blocks, index, alone, lse, scale=case.scale)
        assert torch.equal(alone[row.token], together[row.token])


@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize("shuffled", [False, True])
def test_any_strides(tile: int, shuffled: bool) -> None:
    """Pools whose heads lie inside the pages, or whose rows have a gap; an output that is not contiguous."""
    for density, tokens in ((1.0, 0), (0.5, 20)):
        spans = [(900, 1 if tile == 1 else 300)]
        case = make_case(spans, tile=tile, density=density, tokens=tokens, shuffled=shuffled)
        kv = case.kv
        pages_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (kv.k, kv.v)]
        with_gaps = [torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[-1]] for x in (kv.k, kv.v)]
        for k, v in (pages_first, with_gaps):
            other = PagedKV(k, v, kv.table, kv.length, kv.heads, kv.sink, kv.window, kv.ratio)
            out = torch.full((*case.q.shape[1::-1], 64), torch.nan).transpose(0, 1)
            lse = torch.full(case.q.shape[1::-1], torch.nan).T
            kernel = paged_decode if tile == 1 else paged_prefill
            kernel(case.q, other, case.blocks, case.index, out, lse, scale=case.scale)
            check(out, lse, reference(case), torch.float32)


@pytest.mark.parametrize("tile", [1, 64])
def test_no_blocks_is_no_work(tile: int) -> None:
    case = make_case()
    out, lse = case.blank()
    nothing = torch.zeros(2, 0, dtype=torch.int32)
    kernel = paged_decode if tile == 1 else paged_prefill
    index = SparseIndex(nothing, nothing, nothing[0])
    kernel(case.q, case.kv, QueryBlocks.of(tile, []), index, out, lse, scale=1.0)
    assert out.isnan().all() and lse.isnan().all()


def test_a_head_that_releases_pages_reads_what_is_left() -> None:
    case = make_case([(1500, 200)], windows=[(64, 256)])
    assert (case.kv.table == NULL_PAGE).any()
    run(case)
