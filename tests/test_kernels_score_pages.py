"""page_mass and bound_mass: what a CPU runs and what they mean in torch against the definition in float64, the Triton
kernels against torch."""

import pytest
import torch
from kernel_checks import run_interpreted
from mass_cases import (
    SCALE,
    MassCase,
    bound_logits,
    check_mass,
    make_mass_case,
    page_logits,
    reference_mass,
)

from gossamer.kernels import cpu_scores
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.score_pages import bound_mass, bound_mass_torch, page_mass, page_mass_torch


def check_both(case: MassCase, stretches: int = 4) -> None:
    keys, bounds = case.table(case.q.shape[2]), case.bounds(stretches)
    given = (case.q, case.kv, case.blocks)
    for of_keys, of_bounds in ((page_mass, bound_mass), (page_mass_torch, bound_mass_torch)):
        check_mass(of_keys(*given, keys, scale=SCALE), reference_mass(case, 1, page_logits(keys)))
        check_mass(of_bounds(*given, bounds, scale=SCALE), reference_mass(case, 1, bound_logits(bounds)))


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tile", [1, 32])
def test_group_sizes(ratio: int, tile: int) -> None:
    check_both(make_mass_case(ratio=ratio, tile=tile))


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes_types_and_released_pages(dim: int, released: bool, dtype: torch.dtype) -> None:
    for tile in (1, 64):
        check_both(make_mass_case(dim=dim, released=released, dtype=dtype, tile=tile), stretches=2)


@pytest.mark.parametrize("part", [1, 700, 5000])
@pytest.mark.parametrize("gathered", [1, 2000])
def test_parts_of_any_size(monkeypatch: pytest.MonkeyPatch, part: int, gathered: int) -> None:
    monkeypatch.setattr(cpu_scores, "PART", part)
    monkeypatch.setattr(cpu_scores, "GATHERED", gathered)
    check_both(make_mass_case([(100, 200), (0, 33), (230, 3)], released=True))
    check_both(make_mass_case([(700, 1), (20, 1), (230, 1)], released=True, tile=1))


def test_one_query_in_the_middle_of_a_wide_tile() -> None:
    check_both(make_mass_case([(200, 1), (127, 1), (128, 1)], tile=128))


def test_mass_of_a_block_adds_up_to_one_and_is_zero_without_a_past() -> None:
    case = make_mass_case(((0, 200), (10, 30), (200, 30)))
    mass = page_mass(case.q, case.kv, case.blocks, case.table(64), scale=SCALE)
    expected = [float(row.pos // 32 * 32 >= 64) for row in case.blocks.rows]
    assert 0.0 in expected and 1.0 in expected
    torch.testing.assert_close(mass.sum(-1), torch.tensor(expected).expand(2, -1))


def test_some_of_the_tiles_in_any_order() -> None:
    case = make_mass_case()
    keys = case.table(64)
    whole = page_mass(case.q, case.kv, case.blocks, keys, scale=SCALE)
    own = [3, 0, 1, 5, 6, 2]
    mass = page_mass(case.q, case.kv, case.blocks.take(own), keys, scale=SCALE)
    torch.testing.assert_close(mass, whole[:, own])


def test_the_mass_of_a_generated_token_does_not_depend_on_its_neighbours() -> None:
    case = make_mass_case([(700, 1), (230, 1), (2000, 1)], tile=1)
    keys = case.table(64)
    whole = page_mass(case.q, case.kv, case.blocks, keys, scale=SCALE)
    for n in range(3):
        assert torch.equal(page_mass(case.q, case.kv, case.blocks.take([n]), keys, scale=SCALE)[:, 0], whole[:, n])


def test_no_tiles() -> None:
    case = make_mass_case()
    blocks = QueryBlocks.of(32, [])
    assert page_mass(case.q, case.kv, blocks, case.table(64), scale=SCALE).shape == (2, 0, case.kv.table.shape[1])


def test_queries_and_keys_of_a_gate_may_be_of_another_size_than_the_heads() -> None:
    case = make_mass_case(dim=64)
    q = torch.randn(*case.q.shape[:2], 24)
    gate = MassCase(q.transpose(0, 1).contiguous().transpose(0, 1), case.kv, case.blocks, case.full)
    keys = gate.table(24, dtype=torch.bfloat16)
    expected = reference_mass(gate, 1, page_logits(keys))
    check_mass(page_mass(gate.q, gate.kv, gate.blocks, keys, scale=SCALE), expected)


def test_triton_kernels_equal_their_torch_forms_under_the_interpreter() -> None:
    run_interpreted("scores_interpreted.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("tile", "ratio"), [(1, 1), (1, 8), (16, 8), (32, 3), (64, 2), (128, 1), (8, 16)])
def test_on_a_gpu(dtype: torch.dtype, dim: int, tile: int, ratio: int) -> None:
    for released in (False, True):
        case = make_mass_case(tile=tile, ratio=ratio, dim=dim, dtype=dtype, released=released)
        keys, bounds = case.table(dim), case.bounds(4)
        mass = page_mass(*case.cuda(), keys.cuda(), scale=SCALE)
        check_mass(mass, reference_mass(case, 1, page_logits(keys)), 1e-4)
        mass = bound_mass(*case.cuda(), bounds.cuda(), scale=SCALE)
        check_mass(mass, reference_mass(case, 1, bound_logits(bounds)), 1e-4)


@pytest.mark.gpu
def test_on_a_gpu_a_block_does_not_depend_on_its_neighbours() -> None:
    case = make_mass_case([(3000, 1), (700, 1), (9000, 1)], tile=1, dtype=torch.bfloat16)
    (q, kv, blocks), keys = case.cuda(), case.table(64).cuda()
    together = page_mass(q, kv, blocks, keys, scale=SCALE)
    for n in range(len(blocks)):
        alone = page_mass(q, kv, blocks.take([n]), keys, scale=SCALE)
        assert torch.equal(alone[:, 0], together[:, n])


@pytest.mark.gpu
def test_on_a_gpu_offsets_beyond_32_bits() -> None:
    """A page whose key lies more than 2**31 numbers from the table's beginning."""
    case = make_mass_case(heads=(0,), dim=128, dtype=torch.bfloat16)
    (q, kv, blocks), keys = case.cuda(), case.table(128)
    shift = 2**31 // 128 + 8
    table = torch.zeros(1, shift + keys.shape[1], 128, dtype=keys.dtype, device="cuda")
    table[:, shift:] = keys.cuda()
    far = PagedKV(
        kv.k,
        kv.v,
        torch.where(kv.table < 0, kv.table, kv.table + shift),
        kv.length,
        kv.heads,
        kv.sink,
        kv.window,
        kv.ratio,
    )
    check_mass(page_mass(q, far, blocks, table, scale=SCALE), reference_mass(case, 1, page_logits(keys)), 1e-4)
