"""One program per (query, KV head, gate query): the queries of the group turned back, times a matrix."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.gates import EPSILON
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.rotary import Rotary
from gossamer.kernels.triton.tiles import VARYING

ROWS = 16  # of the matrix at a time


def launch(
    q: Tensor, kv: PagedKV, blocks: QueryBlocks, weight: Tensor, norm: Tensor | None, rotary: Rotary, turned: Rotary
) -> Tensor:
    """As gossamer.kernels.gates.gate_queries, for blocks of one query each."""
    groups, (heads, each, _, width) = kv.heads.numel(), weight.shape
    gate = torch.empty(len(blocks), heads * each, width, dtype=torch.float32, device=q.device)
    if len(blocks):
        pairs, rest = turned.inv_freq.numel(), width - 2 * turned.inv_freq.numel()
        _gate_queries[(len(blocks), groups, each)](
            q, weight.contiguous(), q if norm is None else norm, rotary.inv_freq, turned.inv_freq, gate,
            kv.heads, blocks.token, blocks.pos, blocks.count,
            *q.stride()[:2], heads, each, float(rotary.scaling), float(turned.scaling), EPSILON,
            RATIO=kv.ratio, DIM=q.shape[2], BACK=rotary.inv_freq.numel(), WIDTH=width, PAIRS=pairs,
            WIDE=triton.next_power_of_2(max(1, pairs)), REST=triton.next_power_of_2(rest) if rest else 0,
            NORM=norm is not None, ROWS=ROWS,
            enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
        )  # fmt: skip
    return gate


@triton.jit(do_not_specialize=(*VARYING, "heads", "each"))
def _gate_queries(
    q_ptr, weight_ptr, norm_ptr, back_ptr, turned_ptr, gate_ptr, heads_ptr, token_ptr, pos_ptr, count_ptr,
    q_t, q_h, heads, each, scaling, turned_scaling, epsilon,
    RATIO: tl.constexpr, DIM: tl.constexpr, BACK: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """gate [N, heads * each, WIDTH], whose dimensions i and PAIRS + i turn; REST: room for what is behind these."""
    n, g, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(count_ptr + n) == 0:
        return
    pos, head = tl.load(pos_ptr + n), tl.load(heads_ptr + g).to(tl.int64)
    q_ptr += tl.load(token_ptr + n).to(tl.int64) * q_t + head * RATIO * q_h
    gate_ptr += ((n * heads + head) * each + j) * WIDTH
    weight_ptr += (head * each + j) * RATIO * DIM * WIDTH
    i, e = tl.arange(0, ROWS), tl.arange(0, WIDE)
    turns = e < PAIRS
    low, high = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
    rest = tl.zeros((REST if REST else 1,), tl.float32)
    for r in range(RATIO):
        for first in range(0, BACK, ROWS):
            at, real = first + i, first + i < BACK
            angle = pos.to(tl.float32) * tl.load(back_ptr + at, mask=real, other=0.0)
            cos, sin = tl.cos(angle) / scaling, tl.sin(angle) / scaling
            one = tl.load(q_ptr + r * q_h + at, mask=real, other=0.0).to(tl.float32)
            other = tl.load(q_ptr + r * q_h + BACK + at, mask=real, other=0.0).to(tl.float32)
            low, high, rest = _add(
                low, high, rest, one * cos + other * sin, weight_ptr, r * DIM + at, real, e, turns, WIDTH, PAIRS, REST
            )
            low, high, rest = _add(
                low, high, rest, other * cos - one * sin, weight_ptr, r * DIM + BACK + at, real, e, turns, WIDTH, PAIRS,
                REST,
            )  # fmt: skip
        for first in range(2 * BACK, DIM, ROWS):
            at, real = first + i, first + i < DIM
            plain = tl.load(q_ptr + r * q_h + at, mask=real, other=0.0).to(tl.float32)
            low, high, rest = _add(low, high, rest, plain, weight_ptr, r * DIM + at, real, e, turns, WIDTH, PAIRS, REST)
    f = 2 * PAIRS + tl.arange(0, REST if REST else 1)
    if NORM:
        square = tl.sum(low * low, 0) + tl.sum(high * high, 0) + tl.sum(rest * rest, 0)
        factor = tl.rsqrt(square / WIDTH + epsilon)
        low *= factor * tl.load(norm_ptr + e, mask=turns, other=0.0).to(tl.float32)
        high *= factor * tl.load(norm_ptr + PAIRS + e, mask=turns, other=0.0).to(tl.float32)
        rest *= factor * tl.load(norm_ptr + f, mask=f < WIDTH, other=0.0).to(tl.float32)
    angle = pos.to(tl.float32) * tl.load(turned_ptr + e, mask=turns, other=0.0)
    cos, sin = tl.cos(angle) * turned_scaling, tl.sin(angle) * turned_scaling
    tl.store(gate_ptr + e, low * cos - high * sin, mask=turns)
    tl.store(gate_ptr + PAIRS + e, high * cos + low * sin, mask=turns)
    if REST:
        tl.store(gate_ptr + f, rest, mask=f < WIDTH)


@triton.jit
def _add(
    low, high, rest, x, weight_ptr, row, real, e, turns, WIDTH: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """x [ROWS] times those rows of the matrix, onto the three parts of the gate's query."""
    at = weight_ptr + (row * WIDTH)[:, None]
    mask = real[:, None] & turns[None]
    low += tl.sum(x[:, None] * tl.load(at + e[None], mask=mask, other=0.0).to(tl.float32), 0)
    high += tl.sum(x[:, None] * tl.load(at + PAIRS + e[None], mask=mask, other=0.0).to(tl.float32), 0)
    if REST:
        f = 2 * PAIRS + tl.arange(0, REST)
        some = tl.load(at + f[None], mask=real[:, None] & (f < WIDTH)[None], other=0.0).to(tl.float32)
        rest += tl.sum(x[:, None] * some, 0)
    return low, high, rest
