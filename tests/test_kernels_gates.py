"""gate_queries: the torch form against the definition in float64, and the Triton form against the torch form."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import make_case
from kernel_checks import run_interpreted
from torch import Tensor

from gossamer.kernels.gates import EPSILON, gate_queries, gate_queries_torch
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.rotary import Rotary

SPANS = [(5, 1), (130, 1), (900, 1)]
SHAPES = (  # head size, dimensions of it that turn, gate's size, dimensions of it that turn, gate queries
    (64, 64, 64, 64, 1),
    (32, 32, 128, 128, 2),
    (80, 20, 24, 8, 3),  # each in part
)


def rotary(turned: int, base: float, scaling: float = 1.0) -> Rotary:
    return Rotary(base ** -(torch.arange(turned // 2) * 2 / turned), scaling)


def make_gate(
    shape: tuple[int, ...], tile: int, *, norm: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, PagedKV, QueryBlocks, Tensor, Tensor | None, Rotary, Rotary]:
    """What gate_queries takes: two of three heads of a layer."""
    dim, back, width, turned, each = shape
    spans = [(past, new if tile == 1 else 70) for past, new in SPANS]
    case = make_case(spans, tile=tile, heads=(2, 0), layer_heads=3, ratio=3, dim=dim, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, each, 3 * dim, width, generator=generator).to(dtype) / dim
    scale = torch.rand(width, generator=generator) + 0.5 if norm else None
    return case.q, case.kv, case.blocks, weight, scale, rotary(back, 1e4, 1.25), rotary(turned, 500.0)


def expected(given: tuple[Any, ...], n: int, head: int, j: int) -> Tensor:
    """One gate query in float64, straight from the formula."""
    q, kv, blocks, weight, norm, back, turned = given
    row, ratio = blocks.rows[n], kv.ratio
    mean = torch.zeros(ratio, q.shape[2], dtype=torch.float64)
    for i in range(row.count):
        own = q[row.token + i, head * ratio : (head + 1) * ratio].double()
        mean += turn(own, -(row.pos + i), Rotary(back.inv_freq, 1 / back.scaling)) / row.count
    gate = mean.flatten() @ weight[head, j].double()
    if norm is not None:
        gate = gate / (gate.square().mean() + EPSILON).sqrt() * norm.double()
    return turn(gate[None], row.pos // blocks.size * blocks.size, turned)[0]


def turn(x: Tensor, position: int, by: Rotary) -> Tensor:
    """As complex numbers; the first 2 R dimensions grow by `scaling`."""
    pairs = len(by.inv_freq)
    angle = position * by.inv_freq.double()
    turned = torch.complex(x[:, :pairs], x[:, pairs : 2 * pairs]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real * by.scaling, turned.imag * by.scaling, x[:, 2 * pairs :]), 1)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tile", [1, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape: tuple[int, ...], tile: int, norm: bool) -> None:
    given = make_gate(shape, tile, norm=norm)
    found = gate_queries(*given).unflatten(1, (3, -1))
    assert found.dtype == torch.float32 and found.shape == (len(given[2]), 3, shape[4], shape[2])
    for n, head, j in itertools.product(range(len(given[2])), (0, 2), range(shape[4])):
        torch.testing.assert_close(found[n, head, j].double(), expected(given, n, head, j), atol=2e-4, rtol=2e-4)


def test_triton_under_the_interpreter() -> None:
    run_interpreted("gates_interpreted.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape: tuple[int, ...], tile: int, dtype: torch.dtype) -> None:
    for norm in (False, True):
        q, kv, blocks, weight, scale, *both = make_gate(shape, tile, norm=norm, dtype=dtype)
        there = PagedKV(*(x.cuda() for x in (kv.k, kv.v, kv.table, kv.length, kv.heads, kv.sink, kv.window)), kv.ratio)
        own = QueryBlocks.of(tile, blocks.rows, "cuda")
        turned = [Rotary(each.inv_freq.cuda(), each.scaling) for each in both]
        mine = gate_queries(q.cuda(), there, own, weight.cuda(), None if scale is None else scale.cuda(), *turned)
        theirs = gate_queries_torch(q, kv, blocks, weight, scale, *both)
        for head in (0, 2):
            some = slice(head * shape[4], (head + 1) * shape[4])
            torch.testing.assert_close(mine[:, some].cpu(), theirs[:, some], atol=1e-3, rtol=1e-3)
