"""One program per (sequence, KV head, piece of its run); a second kernel joins the pieces.

Pieces have a fixed size, so a sequence's result never depends on what else is in the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.triton.tiles import LN_2, add_keys, add_sink, factors, load_rows

PIECE = 8  # pages; and as many tokens as these pages hold


def tile(dim: int, itemsize: int, ratio: int) -> dict[str, int]:
    """Packed heads per program and compiler options; tests/test_kernels_compile.py holds them to the chips' limits."""
    wide = max(16, triton.next_power_of_2(dim))
    warps, stages = (4, 3) if wide * itemsize <= 256 else (4, 2) if itemsize < 4 else (8, 2 if wide <= 128 else 1)
    return {"M": max(16, triton.next_power_of_2(ratio)), "WIDE": wide, "num_warps": warps, "num_stages": stages}


def launch(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """As gossamer.kernels.paged_decode.paged_decode."""
    dim, groups, size = q.shape[2], kv.heads.numel(), kv.page_size
    options = tile(dim, kv.k.element_size(), kv.ratio)
    # A row reads no more pages than its sequence has, and no more tokens than these hold.
    pieces = [row.pos // size // PIECE + 1 for row in blocks.rows]
    first = ((blocks.pos // (size * PIECE) + 1).cumsum(0, dtype=torch.int32) - blocks.pos // (size * PIECE) - 1).int()
    part = torch.empty(sum(pieces), groups, kv.ratio, options["WIDE"], dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part.shape[:-1], dtype=torch.float32, device=q.device)
    tokens = index.tokens is not None
    singles = (
        (index.token_start, index.token_count, index.tokens) if tokens else (index.start, index.count, index.pages)
    )
    token_stride = index.token_start.stride(0) if index.token_start is not None else 0
    _paged_decode[(max(pieces), len(blocks), groups)](
        q, kv.k, kv.v, part, part_lse,
        kv.table, kv.heads, kv.sink, kv.window, blocks.seq, blocks.token, blocks.pos, first,
        index.start, index.count, index.pages, *singles,
        *q.stride()[:2], *kv.k.stride()[:3], *kv.v.stride()[:3],
        kv.table.stride(0), kv.sink.stride(0), index.start.stride(0), token_stride,
        *factors(scale, softcap), kv.ratio,
        PAGE=size, DIM=dim, PIECE=PIECE, TOKENS=tokens, SOFTCAP=softcap > 0, **options,
        enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
    )  # fmt: skip
    _join_pieces[(len(blocks), groups)](
        part, part_lse, out, lse, index.start if sinks is None else sinks,
        kv.heads, blocks.token, first, index.count, singles[1],
        *out.stride()[:2], *lse.stride(), index.start.stride(0), token_stride, kv.ratio,
        M=options["M"], WIDE=options["WIDE"], PAGE=size, DIM=dim, PIECE=PIECE, TOKENS=tokens, SINKS=sinks is not None,
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _paged_decode(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr,
    table_ptr, heads_ptr, sink_ptr, window_ptr, seq_ptr, token_ptr, pos_ptr, first_ptr,
    start_ptr, count_ptr, pages_ptr, token_start_ptr, token_count_ptr, tokens_ptr,
    q_t, q_h, k_g, k_p, k_s, v_g, v_p, v_s,
    table_b, rule_b, index_g, token_g,
    scale, cap, ratio,
    M: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr,
    TOKENS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    piece, n, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    low, high = piece * PIECE, tl.minimum((piece + 1) * PIECE, tl.load(count_ptr + g * index_g + n))
    token_low, token_high = 0, 0
    if TOKENS:
        token_low = piece * PIECE * PAGE
        token_high = tl.minimum(token_low + PIECE * PAGE, tl.load(token_count_ptr + g * token_g + n))
    if (low >= high) & (token_low >= token_high):
        return
    seq, pos = tl.load(seq_ptr + n), tl.load(pos_ptr + n)
    r, d, s = tl.arange(0, M), tl.arange(0, WIDE), tl.arange(0, PAGE)
    in_head, real = d < DIM, r < ratio
    head = (tl.load(heads_ptr + g) * ratio + r).to(tl.int64)
    q_at = q_ptr + tl.load(token_ptr + n).to(tl.int64) * q_t + (head * q_h)[:, None] + d[None]
    q = tl.load(q_at, mask=real[:, None] & in_head[None], other=0.0).to(k_ptr.dtype.element_ty)

    recent = pos - tl.load(window_ptr + seq * rule_b + g)
    sink = tl.load(sink_ptr + seq * rule_b + g)
    k_ptr += g.to(tl.int64) * k_g
    v_ptr += g.to(tl.int64) * v_g
    table_ptr += seq.to(tl.int64) * table_b
    best = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDE), tl.float32)
    run = pages_ptr + tl.load(start_ptr + g * index_g + n)
    for i in range(low, high):
        page = tl.load(run + i)
        physical = tl.load(table_ptr + page).to(tl.int64)
        key = page * PAGE + s
        seen = (key <= pos) & ((key > recent) | (key < sink))
        k = load_rows(k_ptr + physical * k_p, s * k_s, seen, True, DIM, WIDE)
        v = load_rows(v_ptr + physical * v_p, s * v_s, seen, True, DIM, WIDE)
        best, total, acc = add_keys(q, k, v, best, total, acc, seen[None], scale, cap, True, SOFTCAP)
    if TOKENS:
        token_run = tokens_ptr + tl.load(token_start_ptr + g * token_g + n)
        for i in range(token_low, token_high, PAGE):
            listed = i + s < token_high
            key = tl.load(token_run + i + s, mask=listed, other=0)
            seen = listed & (key <= pos) & ((key > recent) | (key < sink))
            physical = tl.load(table_ptr + key // PAGE, mask=seen, other=0).to(tl.int64)
            k = load_rows(k_ptr, physical * k_p + (key % PAGE) * k_s, seen, True, DIM, WIDE)
            v = load_rows(v_ptr, physical * v_p + (key % PAGE) * v_s, seen, True, DIM, WIDE)
            best, total, acc = add_keys(q, k, v, best, total, acc, seen[None], scale, cap, True, SOFTCAP)

    place = (tl.load(first_ptr + n) + piece).to(tl.int64) * tl.num_programs(2) * ratio + g * ratio + r
    safe = tl.where(total == 0.0, 1.0, total)  # a piece of which the query may see nothing
    tl.store(part_ptr + place[:, None] * WIDE + d[None], acc / safe[:, None], mask=real[:, None])
    tl.store(part_lse_ptr + place, best + tl.log2(safe), mask=real)


@triton.jit
def _join_pieces(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr,
    heads_ptr, token_ptr, first_ptr, count_ptr, token_count_ptr,
    out_t, out_h, lse_t, lse_h, index_g, token_g, ratio,
    M: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr,
    TOKENS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    n, g = tl.program_id(0), tl.program_id(1)
    pieces = tl.cdiv(tl.load(count_ptr + g * index_g + n), PIECE)
    if TOKENS:
        pieces = tl.maximum(pieces, tl.cdiv(tl.load(token_count_ptr + g * token_g + n), PIECE * PAGE))
    r, d = tl.arange(0, M), tl.arange(0, WIDE)
    real = r < ratio
    best = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDE), tl.float32)
    first = tl.load(first_ptr + n).to(tl.int64)
    for piece in range(0, pieces):
        place = ((first + piece) * tl.num_programs(1) + g) * ratio + r
        one = tl.load(part_lse_ptr + place, mask=real, other=0.0)
        out = tl.load(part_ptr + place[:, None] * WIDE + d[None], mask=real[:, None], other=0.0)
        top = tl.maximum(best, one)
        shift = tl.where(top == -float("inf"), 0.0, top)
        weight, decay = tl.exp2(one - shift), tl.exp2(best - shift)
        acc = acc * decay[:, None] + out * weight[:, None]
        total, best = total * decay + weight, top

    head = (tl.load(heads_ptr + g) * ratio + r).to(tl.int64)
    if SINKS:
        best, total, decay = add_sink(best, total, tl.load(sinks_ptr + head, mask=real, other=0.0))
        acc = acc * decay[:, None]
    token = tl.load(token_ptr + n).to(tl.int64)
    out_at = out_ptr + token * out_t + (head * out_h)[:, None] + d[None]
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < DIM)[None])
    tl.store(lse_ptr + token * lse_t + head * lse_h, (best + tl.log2(total)) * LN_2, mask=real)
