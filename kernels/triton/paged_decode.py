"""A work list, and programs that share it: each item is a piece of what one (sequence, KV head) reads.

`_list_pieces` cuts each row's run of pages, and its run of tokens, into pieces and writes them one behind the other.
`_attend_pieces`: as many programs as the chip runs at once take every so many-th item of the list, so that five pages
beside two thousand keep all of it busy, and nothing depends on lengths that only the device knows.
`_join_pieces`: one program per row joins its pieces.

How a row is cut depends on that row alone, so a sequence's result never depends on what else is in the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.triton.fp8 import add_fp8_keys, stored
from gossamer.kernels.triton.tiles import LN_2, VARYING, add_keys, add_sink, factors, load_rows, programs
from gossamer.kernels.triton.tuned import tuned

LEAST_PAGES = 8  # in a piece; shorter ones cost more to join than they gain
MOST_PIECES = 64  # of a row, longer ones get longer pieces; a power of two
PER_SM = 2  # programs that share a multiprocessor: by their registers and memory no more fit, from 128 dimensions on


def tile(dim: int, itemsize: int, ratio: int) -> dict[str, int]:
    """Packed heads per program and compiler options; tests/test_kernels_compile.py holds them to the chips' limits.
    With fewer than five stages the keys of a page wait for those of the one before: two loads lead to them."""
    wide = max(16, triton.next_power_of_2(dim))
    if itemsize < 4:
        warps, stages = (4, 5) if wide <= 128 else (8, 3)
    else:
        warps, stages = (8, 2) if wide <= 64 else (8, 1) if wide <= 128 else (16, 1)
    return {"M": max(16, triton.next_power_of_2(ratio)), "WIDE": wide, "num_warps": warps, "num_stages": stages}


def most_items(rows: int, pages: int) -> int:
    """The longest list that so many rows can make, which read at most so many pages each, and single tokens."""
    return rows * min(MOST_PIECES + 1, -(-pages // LEAST_PAGES) + 1)


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
    own = stored(q, kv)
    options = tile(dim, own.itemsize, kv.ratio) | {"per_sm": PER_SM}
    options = tuned(
        "paged_decode", options, q.device, dim=dim, bytes=kv.k.element_size(), tokens=index.tokens is not None
    )
    per_sm = options.pop("per_sm")
    rows, device = len(blocks) * groups, q.device
    most = most_items(rows, kv.table.shape[1])
    items = torch.empty(most, dtype=torch.int32, device=device)
    first = torch.empty(rows + 1, dtype=torch.int32, device=device)  # where each row's items begin; their number
    part = torch.empty(most, kv.ratio, options["WIDE"], dtype=torch.float32, device=device)
    part_lse = torch.empty(most, kv.ratio, dtype=torch.float32, device=device)
    tokens = index.tokens is not None
    singles = (
        (index.token_start, index.token_count, index.tokens) if tokens else (index.start, index.count, index.pages)
    )
    index_strides = index.start.stride(0), index.token_start.stride(0) if index.token_start is not None else 0
    cut = {"PAGE": size, "LEAST": LEAST_PAGES, "MOST": MOST_PIECES, "TOKENS": tokens}
    _list_pieces[(rows,)](
        index.count, singles[1], items, first, *index_strides, len(blocks), rows, **cut, num_warps=4,
        enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
    )  # fmt: skip
    _attend_pieces[(programs(most, per_sm, device),)](
        q, own.k, own.v, own.scale, part, part_lse,
        kv.table, kv.heads, kv.sink, kv.window, blocks.seq, blocks.token, blocks.pos, items, first,
        index.start, index.count, index.pages, *singles,
        *q.stride()[:2], *kv.k.stride()[:3], *kv.v.stride()[:3], *own.strides,
        kv.table.stride(0), kv.sink.stride(0), *index_strides,
        *factors(scale, softcap), kv.ratio, len(blocks), rows,
        DIM=dim, SOFTCAP=softcap > 0, FP8=own.form, **cut, **options, enable_fp_fusion=True,
    )  # fmt: skip
    _join_pieces[(len(blocks), groups)](
        part, part_lse, out, lse, index.start if sinks is None else sinks, kv.heads, blocks.token, first,
        *out.stride()[:2], *lse.stride(), kv.ratio,
        M=options["M"], WIDE=options["WIDE"], DIM=dim, SINKS=sinks is not None, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _cut(pages, tokens, PAGE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """How many pages a piece of a row has that reads `pages` and `tokens`, and the pieces of either kind."""
    held = pages + (tokens + PAGE - 1) // PAGE
    size = tl.maximum((held + MOST - 1) // MOST, LEAST)
    return size, (pages + size - 1) // size, (tokens + size * PAGE - 1) // (size * PAGE)


@triton.jit(do_not_specialize=VARYING)
def _list_pieces(
    count_ptr, token_count_ptr, items_ptr, first_ptr, index_g, token_g, num, rows,
    PAGE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """items: row * 2 * MOST + piece; first [rows + 1]. Row r is block r % num of head r // num."""
    ROWS: tl.constexpr = 1024
    row = tl.program_id(0)
    before, own = 0, 0
    for begin in range(0, row + 1, ROWS):
        other = begin + tl.arange(0, ROWS)
        there = other <= row
        pages = tl.load(count_ptr + other // num * index_g + other % num, mask=there, other=0)
        tokens = tl.zeros((ROWS,), tl.int32)
        if TOKENS:
            tokens = tl.load(token_count_ptr + other // num * token_g + other % num, mask=there, other=0)
        _, of_pages, of_tokens = _cut(pages, tokens, PAGE, LEAST, MOST)
        before += tl.sum(tl.where(other < row, of_pages + of_tokens, 0), 0)
        own += tl.sum(tl.where(other == row, of_pages + of_tokens, 0), 0)
    piece = tl.arange(0, 2 * MOST)
    tl.store(items_ptr + before + piece, row * 2 * MOST + piece, mask=piece < own)
    tl.store(first_ptr + row, before)
    if row == rows - 1:
        tl.store(first_ptr + rows, before + own)


@triton.jit(do_not_specialize=VARYING)
def _attend_pieces(
    q_ptr, k_ptr, v_ptr, scales_ptr, part_ptr, part_lse_ptr,
    table_ptr, heads_ptr, sink_ptr, window_ptr, seq_ptr, token_ptr, pos_ptr, items_ptr, first_ptr,
    start_ptr, count_ptr, pages_ptr, token_start_ptr, token_count_ptr, tokens_ptr,
    q_t, q_h, k_g, k_p, k_s, v_g, v_p, v_s, scales_v, scales_g, scales_p,
    table_b, rule_b, index_g, token_g,
    scale, cap, ratio, num, rows,
    M: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    r, d, s = tl.arange(0, M), tl.arange(0, WIDE), tl.arange(0, PAGE)
    in_head, real = d < DIM, r < ratio
    for item in range(tl.program_id(0), tl.load(first_ptr + rows), tl.num_programs(0)):
        entry = tl.load(items_ptr + item)
        row, piece = entry // (2 * MOST), entry % (2 * MOST)
        g, n = row // num, row % num
        count = tl.load(count_ptr + g * index_g + n)
        token_count = 0
        if TOKENS:
            token_count = tl.load(token_count_ptr + g * token_g + n)
        size, of_pages, _ = _cut(count, token_count, PAGE, LEAST, MOST)
        low, high = piece * size, tl.minimum((piece + 1) * size, count)

        seq, pos = tl.load(seq_ptr + n), tl.load(pos_ptr + n)
        head = (tl.load(heads_ptr + g) * ratio + r).to(tl.int64)
        q_at = q_ptr + tl.load(token_ptr + n).to(tl.int64) * q_t + (head * q_h)[:, None] + d[None]
        q = tl.load(q_at, mask=real[:, None] & in_head[None], other=0.0)
        if not FP8:
            q = q.to(k_ptr.dtype.element_ty)
        recent = pos - tl.load(window_ptr + seq * rule_b + g)
        sink = tl.load(sink_ptr + seq * rule_b + g)
        keys, values = k_ptr + g.to(tl.int64) * k_g, v_ptr + g.to(tl.int64) * v_g
        own_scales = scales_ptr + g.to(tl.int64) * scales_g
        table = table_ptr + seq.to(tl.int64) * table_b
        best = tl.full((M,), -float("inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, WIDE), tl.float32)
        run = pages_ptr + tl.load(start_ptr + g * index_g + n)
        for i in range(low, high):
            page = tl.load(run + i)
            physical = tl.load(table + page).to(tl.int64)
            key = page * PAGE + s
            seen = (key <= pos) & ((key > recent) | (key < sink))
            k = load_rows(keys + physical * k_p, s * k_s, seen, True, DIM, WIDE)
            v = load_rows(values + physical * v_p, s * v_s, seen, True, DIM, WIDE)
            if FP8:
                scales = own_scales + physical * scales_p + s
                best, total, acc = add_fp8_keys(
                    q, k, v, scales, scales_v, seen, best, total, acc, seen[None], scale, cap, True, SOFTCAP, FP8
                )
            else:
                best, total, acc = add_keys(q, k, v, best, total, acc, seen[None], scale, cap, True, SOFTCAP)
        if TOKENS:
            token_run = tokens_ptr + tl.load(token_start_ptr + g * token_g + n)
            token_low = tl.maximum(piece - of_pages, 0) * size * PAGE
            token_high = tl.where(piece < of_pages, 0, tl.minimum(token_low + size * PAGE, token_count))
            for i in range(token_low, token_high, PAGE):
                listed = i + s < token_high
                key = tl.load(token_run + i + s, mask=listed, other=0)
                seen = listed & (key <= pos) & ((key > recent) | (key < sink))
                physical = tl.load(table + key // PAGE, mask=seen, other=0).to(tl.int64)
                k = load_rows(keys, physical * k_p + (key % PAGE) * k_s, seen, True, DIM, WIDE)
                v = load_rows(values, physical * v_p + (key % PAGE) * v_s, seen, True, DIM, WIDE)
                if FP8:
                    scales = own_scales + physical * scales_p + key % PAGE
                    best, total, acc = add_fp8_keys(
                        q, k, v, scales, scales_v, seen, best, total, acc, seen[None], scale, cap, True, SOFTCAP, FP8
                    )
                else:
                    best, total, acc = add_keys(q, k, v, best, total, acc, seen[None], scale, cap, True, SOFTCAP)

        place = item * ratio + r.to(tl.int64)
        safe = tl.where(total == 0.0, 1.0, total)  # a piece of which the query may see nothing
        tl.store(part_ptr + place[:, None] * WIDE + d[None], acc / safe[:, None], mask=real[:, None])
        tl.store(part_lse_ptr + place, best + tl.log2(safe), mask=real)


@triton.jit
def _join_pieces(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr, heads_ptr, token_ptr, first_ptr,
    out_t, out_h, lse_t, lse_h, ratio,
    M: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    n, g = tl.program_id(0), tl.program_id(1)
    row = g * tl.num_programs(0) + n
    first, end = tl.load(first_ptr + row), tl.load(first_ptr + row + 1)
    r, d = tl.arange(0, M), tl.arange(0, WIDE)
    real = r < ratio
    best = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDE), tl.float32)
    for item in range(first, end):
        place = item * ratio + r.to(tl.int64)
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
    total = tl.where(first < end, total, 1.0)  # a place that is kept free has no query, and gets 0
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < DIM)[None])
    tl.store(lse_ptr + token * lse_t + head * lse_h, (best + tl.log2(total)) * LN_2, mask=real)
