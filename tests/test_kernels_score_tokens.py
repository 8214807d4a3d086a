"""label_mass: what a CPU runs and what it means in torch against the definition in float64, the Triton kernel against
torch."""

import pytest
import torch
from mass_cases import (
    SCALE,
    MassCase,
    check_mass,
    label_logits,
    make_mass_case,
    reference_mass,
)
from torch import Tensor

from gossamer.kernels import cpu_scores
from gossamer.kernels.layout import QueryBlocks
from gossamer.kernels.score_tokens import label_mass, label_mass_torch

# Each head has its own channels, one of them at the end of its list one too few.
CHANNELS = torch.tensor([[3, 40, 17, 0, 63, 9], [50, 2, 33, 8, 21, -1]], dtype=torch.int32)
SIXTEEN = torch.stack((torch.arange(16), torch.arange(63, 31, -2).index_fill(0, torch.tensor([4, 15]), -1))).int()


def labels_of(case: MassCase, dtype: torch.dtype | None = None, channels: Tensor = CHANNELS) -> Tensor:
    """Where no channel is meant, 0, as page_labels writes it."""
    labels = case.table(64, channels.shape[1], dtype=dtype)
    return labels.masked_fill_(channels[:, None, None].to(labels.device) < 0, 0)


def check(case: MassCase) -> None:
    for channels in (CHANNELS, SIXTEEN, SIXTEEN.repeat(1, 3)):
        labels = labels_of(case, channels=channels)
        right = reference_mass(case, 64, label_logits(labels, channels))
        for mass in (label_mass, label_mass_torch):
            check_mass(mass(case.q, case.kv, case.blocks, labels, channels, scale=SCALE), right)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tile", [1, 32])
def test_group_sizes(ratio: int, tile: int) -> None:
    check(make_mass_case(ratio=ratio, tile=tile))


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes_types_and_released_pages(dim: int, released: bool, dtype: torch.dtype) -> None:
    for tile in (1, 64):
        check(make_mass_case(dim=dim, released=released, dtype=dtype, tile=tile))


@pytest.mark.parametrize("part", [1, 9000, 50000])
@pytest.mark.parametrize("gathered", [1, 2000])
def test_parts_of_any_size(monkeypatch: pytest.MonkeyPatch, part: int, gathered: int) -> None:
    monkeypatch.setattr(cpu_scores, "PART", part)
    monkeypatch.setattr(cpu_scores, "GATHERED", gathered)
    check(make_mass_case([(100, 200), (0, 33), (230, 3)], released=True))
    check(make_mass_case([(700, 1), (20, 1), (230, 1)], released=True, tile=1))


def test_a_channel_of_none_does_not_count_whatever_its_label() -> None:
    case = make_mass_case()
    labels = labels_of(case)
    labels[1, ..., -1] = float("nan")
    found = label_mass(case.q, case.kv, case.blocks, labels, CHANNELS, scale=SCALE)
    check_mass(found, reference_mass(case, 64, label_logits(labels, CHANNELS)))


def test_labels_of_all_channels_give_the_softmax_of_the_attention() -> None:
    case = make_mass_case([(256, 1)] * 3, tile=1, ratio=1, heads=(0,))
    labels = case.kv.k  # a page's labels are its keys when every channel is one
    channels = torch.arange(64, dtype=torch.int32)[None]
    found = label_mass(case.q, case.kv, case.blocks, labels, channels, scale=SCALE)
    for n, row in enumerate(case.blocks.rows):
        keys = case.kv.k[0, case.kv.table[row.seq, :4].long()].flatten(0, 1)
        torch.testing.assert_close(found[0, n, :256], (SCALE * keys @ case.q[row.token, 0]).softmax(0))


def test_no_tiles() -> None:
    case = make_mass_case()
    found = label_mass(case.q, case.kv, QueryBlocks.of(32, []), labels_of(case), CHANNELS, scale=SCALE)
    assert found.shape == (2, 0, case.kv.table.shape[1] * 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("tile", "ratio"), [(1, 1), (1, 8), (16, 8), (32, 3), (64, 2), (128, 1), (8, 16)])
def test_on_a_gpu(dtype: torch.dtype, dim: int, tile: int, ratio: int) -> None:
    for released in (False, True):
        case = make_mass_case(tile=tile, ratio=ratio, dim=dim, dtype=dtype, released=released)
        labels = labels_of(case)
        found = label_mass(*case.cuda(), labels.cuda(), CHANNELS.cuda(), scale=SCALE)
        check_mass(found, reference_mass(case, 64, label_logits(labels, CHANNELS)), 1e-4)


@pytest.mark.gpu
def test_on_a_gpu_a_block_does_not_depend_on_its_neighbours() -> None:
    case = make_mass_case([(3000, 1), (700, 1), (9000, 1)], tile=1, dtype=torch.bfloat16)
    (q, kv, blocks), labels, channels = case.cuda(), labels_of(case).cuda(), CHANNELS.cuda()
    together = label_mass(q, kv, blocks, labels, channels, scale=SCALE)
    for n in range(len(blocks)):
        alone = label_mass(q, kv, blocks.take([n]), labels, channels, scale=SCALE)
        assert torch.equal(alone[:, 0], together[:, n])
