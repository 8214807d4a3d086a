"""One program per (16 tokens of a query block, KV head)."""

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.triton.fp8 import quantise, stored
from gossamer.kernels.triton.tiles import VARYING

ROWS = 16


def launch(k: Tensor, v: Tensor, kv: PagedKV, blocks: QueryBlocks) -> None:
    """As gossamer.kernels.store.store."""
    rows = min(ROWS, triton.next_power_of_2(blocks.size))
    own = stored(k, kv)
    _store[(len(blocks), triton.cdiv(blocks.size, rows), kv.heads.numel())](
        k, v, own.k, own.v, own.scale, kv.table, kv.heads, blocks.seq, blocks.token, blocks.pos, blocks.count,
        *k.stride()[:2], *v.stride()[:2], *kv.k.stride()[:3], *kv.v.stride()[:3], *own.strides, kv.table.stride(0),
        ROWS=rows, WIDE=triton.next_power_of_2(k.shape[2]), PAGE=kv.page_size, DIM=k.shape[2], FP8=own.form > 0,
        enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _store(
    k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, scales_ptr, table_ptr, heads_ptr, seq_ptr, token_ptr, pos_ptr, count_ptr,
    k_t, k_h, v_t, v_h, k_g, k_p, k_s, v_g, v_p, v_s, scales_v, scales_g, scales_p, table_b,
    ROWS: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    n, g = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i, d = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    real = i < tl.load(count_ptr + n)
    pos = tl.load(pos_ptr + n) + i
    table_ptr += tl.load(seq_ptr + n).to(tl.int64) * table_b
    physical = tl.load(table_ptr + pos // PAGE, mask=real, other=0).to(tl.int64)
    token, head = (tl.load(token_ptr + n) + i).to(tl.int64), tl.load(heads_ptr + g).to(tl.int64)
    mask = real[:, None] & (d < DIM)[None]
    k = tl.load(k_ptr + (token * k_t + head * k_h)[:, None] + d[None], mask=mask)
    v = tl.load(v_ptr + (token * v_t + head * v_h)[:, None] + d[None], mask=mask)
    row = (pos % PAGE).to(tl.int64)
    k_at = k_pool_ptr + (g * k_g + physical * k_p + row * k_s)[:, None] + d[None]
    v_at = v_pool_ptr + (g * v_g + physical * v_p + row * v_s)[:, None] + d[None]
    if FP8:
        k, k_scale = quantise(tl.where(mask, k, 0.0).to(tl.float32))
        v, v_scale = quantise(tl.where(mask, v, 0.0).to(tl.float32))
        scale_at = scales_ptr + g * scales_g + physical * scales_p + row
        tl.store(scale_at, k_scale.to(scales_ptr.dtype.element_ty), mask=real)
        tl.store(scale_at + scales_v, v_scale.to(scales_ptr.dtype.element_ty), mask=real)
    tl.store(k_at, k.to(k_pool_ptr.dtype.element_ty), mask=mask)
    tl.store(v_at, v.to(v_pool_ptr.dtype.element_ty), mask=mask)
