"""Selectors on the demo model's own queries and keys, against their formulas written out in float64."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from captured_cases import demo_layers, last_blocks, paged
from torch import Tensor

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.profiling.capture import Captured
from gossamer.attention.profiling.gates import Phase, distil, lesson, write_gates
from gossamer.attention.profiling.labels import rank_channels
from gossamer.attention.selectors import BlockSparse, Budget, DoubleSparsity, LearnedGate, Selector, VerticalSlash
from gossamer.kernels.layout import PAGE_SIZE, BlockRow
from gossamer.kernels.rotary import Rotary
from gossamer.kvcache.summaries import Labels

LENGTH = 1400
BUDGET = Budget("tokens", 8 * PAGE_SIZE)
Logits = Callable[[Tensor, int], Tensor]  # queries [count, ratio, D], KV head -> [rows, ratio, columns]

both_phases = pytest.mark.parametrize("size", [64, 1], ids=["prefill", "decode"])
every_layer = pytest.mark.parametrize("layer", range(4))


def mass(logits: Tensor) -> Tensor:
    """[rows, ratio, columns] -> [columns]: softmax, mean over the rows, maximum over the group."""
    found = logits.softmax(-1).mean(0).amax(0)
    return found / found.sum()


def pages_of(layer: Captured, group: int, past: int) -> Tensor:
    """[past, S, D] float64"""
    return layer.k[: past * PAGE_SIZE, group].double().unflatten(0, (past, PAGE_SIZE))


def queries_of(layer: Captured, row: BlockRow, group: int) -> Tensor:
    """[count, ratio, D] float64, times the scale"""
    heads = slice(group * layer.ratio, (group + 1) * layer.ratio)
    return layer.q[row.pos : row.pos + row.count, heads].double() * layer.scale


def check(layer: Captured, selector: Selector, size: int, estimate: Callable[[BlockRow, int, int], Tensor]) -> None:
    """The chosen pages beside the first are those of the largest estimates (estimate(row, group, past) -> [past])."""
    q, blocks = last_blocks(layer, size, 5 if size > 1 else 12)
    pages = selector.propose(q, paged(layer, selector.summaries), blocks, layer.scale).pages
    for (n, row), group in itertools.product(enumerate(blocks.rows), range(layer.k.shape[1])):
        past = row.pos // size * size // PAGE_SIZE
        chosen = pages[group, n, :past]
        expected = estimate(row, group, past)
        expected[0] = 2.0
        wanted = int(BUDGET.value) // PAGE_SIZE - 1  # the block's own page is one
        assert int(chosen.sum()) == wanted < past
        least, rest = expected[chosen].min(), expected[~chosen].max()
        assert least >= rest - 1e-5 * rest.abs() - 1e-9, (n, group, float(least), float(rest))


@both_phases
@every_layer
def test_mean_keys(layer: int, size: int) -> None:
    own = demo_layers(LENGTH)[layer]

    def estimate(row: BlockRow, group: int, past: int) -> Tensor:
        return mass(queries_of(own, row, group) @ pages_of(own, group, past).mean(1).T)

    check(own, BlockSparse(BUDGET), size, estimate)


@both_phases
@every_layer
def test_bounds(layer: int, size: int) -> None:
    own = demo_layers(LENGTH)[layer]

    def estimate(row: BlockRow, group: int, past: int) -> Tensor:
        q = queries_of(own, row, group)[:, :, None, None]  # [count, ratio, 1, 1, D]
        quarters = pages_of(own, group, past).unflatten(1, (4, 16))  # [past, 4, 16, D]
        low, high = quarters.amin(2), quarters.amax(2)
        return mass(torch.maximum(q * low, q * high).sum(-1).amax(-1))

    check(own, BlockSparse(BUDGET, "bounds"), size, estimate)


@pytest.mark.parametrize("stride", [8, 16])
@every_layer
def test_antidiagonals(layer: int, stride: int) -> None:
    own = demo_layers(LENGTH)[layer]

    def estimate(row: BlockRow, group: int, past: int) -> Tensor:
        q, keys = queries_of(own, row, group), pages_of(own, group, past).flatten(0, 1)
        logits = []
        for first in range(0, row.count, stride):
            total = torch.zeros(own.ratio, len(keys) // stride, dtype=torch.float64)
            for c in range(min(stride, row.count - first)):
                total += q[first + c] @ keys[stride - 1 - c :: stride].T / stride
            logits.append(total)
        groups = torch.stack(logits).softmax(-1).unflatten(-1, (past, -1)).sum(-1)  # [query groups, ratio, past]
        found = groups.mean(0).amax(0)
        return found / found.sum()

    check(own, BlockSparse(BUDGET, "antidiagonal", stride), 64, estimate)


@pytest.mark.parametrize(("phase", "size"), [("prefill", 64), ("decode", 1)])
@every_layer
def test_gates(tmp_path: Path, layer: int, phase: Phase, size: int) -> None:
    own = demo_layers(LENGTH)[layer]
    inv_freq = 1e12 ** -(torch.arange(32) * 2 / 64)
    rotary = Rotary(inv_freq)
    weights = distil([lesson(own, rotary, range(256, 1024, 64), size)], rotary, 5)
    write_gates(tmp_path / "gates.safetensors", [{phase: weights}], rotary, rotary)
    gate = Artefacts(tmp_path).gate("gates.safetensors", 0, phase, own.k.shape[1], own.k.shape[2])
    query, key = weights.query.bfloat16().double(), weights.key.bfloat16().double()

    def turned(x: Tensor, place: Tensor, sign: float) -> Tensor:
        """x [n, ..., D] at place [n]"""
        angle = (sign * place.double()[:, None] * inv_freq.double()).view(len(x), *[1] * (x.dim() - 2), -1)
        low, high = x.double().split(inv_freq.numel(), -1)
        return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)

    def estimate(row: BlockRow, group: int, past: int) -> Tensor:
        plain = turned(own.k[: past * PAGE_SIZE, group], torch.arange(past * PAGE_SIZE), -1.0)
        paged_keys = plain.unflatten(0, (past, PAGE_SIZE))
        pooled = torch.cat((paged_keys.amax(1), paged_keys.amin(1), paged_keys.mean(1)), -1)
        keys = turned(pooled @ key[group], torch.arange(past) * PAGE_SIZE, 1.0)
        heads = slice(group * own.ratio, (group + 1) * own.ratio)
        places = torch.arange(row.pos, row.pos + row.count)
        mean = turned(own.q[row.pos : row.pos + row.count, heads], places, -1.0).mean(0).flatten()
        asked = turned((mean @ query[group, 0])[None], torch.tensor([row.pos // size * size]), 1.0)[0]
        return (keys @ asked * own.k.shape[2] ** -0.5).softmax(0)

    check(own, LearnedGate(gate.keys, BUDGET, gate.query, gate.norm, phase), size, estimate)


@every_layer
def test_columns_and_diagonals(layer: int) -> None:
    own, probe = demo_layers(LENGTH)[layer], 64
    q, blocks = last_blocks(own, 64, 5)
    selector = VerticalSlash(40, 12, probe)
    proposal = selector.propose(q, paged(own), blocks, own.scale)
    assert proposal.tokens is not None
    length = len(own.k)
    for group in range(own.k.shape[1]):
        columns, distances = torch.zeros(2, length, dtype=torch.float64)
        for t in range(length - probe, length):
            row = queries_of(own, BlockRow(0, 0, t, 1), group)[0]
            weights = (row @ own.k[: t + 1, group].double().T).softmax(-1).mean(0)
            columns[: t + 1] += weights
            distances[: t + 1] += weights.flip(0)
        read = proposal.tokens[group, 0].long()
        assert len(read) == 40 and columns[read].min() >= columns.topk(40).values.min() * (1 - 1e-4)
        slack = distances.topk(12).values.min() * torch.tensor([1 - 1e-4, 1 + 1e-4])
        for n, block in enumerate(blocks.rows):
            places = range(block.pos, block.pos + block.count)
            sure, possible = (
                {(t - o) // PAGE_SIZE for t in places for o in far.nonzero().flatten().tolist() if t >= o}
                for far in (distances > slack[1], distances >= slack[0])
            )
            assert sure <= set(proposal.pages[group, n].nonzero().flatten().tolist()) <= possible


@every_layer
def test_label_channels(layer: int) -> None:
    own, count = demo_layers(LENGTH)[layer], 200
    channels = rank_channels([[own]])[0][:, :16].contiguous()
    labels = Labels("test", tuple(map(tuple, channels.tolist())), channels)
    q, blocks = last_blocks(own, 1, 10)
    selector = DoubleSparsity(labels, count)
    tokens = selector.propose(q, paged(own, selector.summaries), blocks, own.scale).tokens
    assert tokens is not None
    for (n, row), group in itertools.product(enumerate(blocks.rows), range(own.k.shape[1])):
        past, chosen = row.pos // PAGE_SIZE * PAGE_SIZE, channels[group].long()
        logits = queries_of(own, row, group)[..., chosen] @ own.k[:past, group].double()[:, chosen].T
        expected, read = mass(logits), tokens[group, n].long()
        assert len(read.unique()) == count
        assert expected[read].min() >= expected.topk(count).values.min() * (1 - 1e-4)
