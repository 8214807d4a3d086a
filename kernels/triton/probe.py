"""Three kernels: the log-sum-exp of each row over pieces of its keys; the weights of one page, summed by key and by
distance; and these partial sums of distances joined. Every sum has a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.probe import newest_queries
from gossamer.kernels.triton.fp8 import load_scales, stored, widen
from gossamer.kernels.triton.tiles import LN_2, LOG2_E, VARYING, load_rows

PIECE = 16  # pages
OFFSETS = 256  # distances that a program of the third kernel joins


def tile(dim: int, itemsize: int, queries: int, fp8: bool = False) -> dict[str, int]:
    """Rows per program and compiler options, for spans of up to `queries` rows; nothing is spilled, as tests see."""
    wide = max(16, triton.next_power_of_2(dim))
    block = min(64, max(16, triton.next_power_of_2(queries)))
    if itemsize == 4:  # there to be right, not fast
        block = 32 if wide == 128 and not fp8 else 16
    return {"M": block, "WIDE": wide, "num_warps": 8, "num_stages": 2 if itemsize < 4 and wide <= 128 else 1}


def launch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, probe: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """As gossamer.kernels.probe.probe_mass, for at least one block."""
    heads, size, dim = kv.heads.numel(), kv.page_size, q.shape[2]
    columns = torch.zeros(heads, kv.table.shape[0], kv.table.shape[1] * size, dtype=torch.float32, device=q.device)
    diagonals = torch.zeros_like(columns)
    rows = newest_queries(blocks, probe)
    spans = QueryBlocks.of(probe, rows, q.device)
    queries, pages = max(row.count for row in rows), max((row.pos + row.count - 1) // size + 1 for row in rows)
    own = stored(q, kv)
    about = (kv.table, kv.length, kv.heads, kv.sink, kv.window, spans.seq, spans.token, spans.pos, spans.count)
    strides = (*q.stride()[:2], *kv.k.stride()[:3], *own.strides[1:], kv.table.stride(0), kv.sink.stride(0))
    options = tile(dim, own.itemsize, queries * kv.ratio, own.form > 0)
    pieces = triton.cdiv(pages, PIECE)
    part = torch.full((len(rows), heads, queries * kv.ratio, pieces), -torch.inf, device=q.device)
    _row_lse[(pieces, triton.cdiv(part.shape[2], options["M"]), len(rows) * heads)](
        q, own.k, own.scale, part, *about, *strides, heads, part.shape[2], pieces, scale * LOG2_E, kv.ratio,
        PAGE=size, DIM=dim, PIECE=PIECE, FP8=own.form, **options,
        enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
    )  # fmt: skip
    lse = part.logsumexp(-1)
    options = tile(dim, own.itemsize, queries, own.form > 0)
    chunks = triton.cdiv(queries, options["M"])
    distances = torch.empty(len(rows), heads, chunks, pages, 2 * size, dtype=torch.float32, device=q.device)
    _page_sums[(pages, heads, len(rows))](
        q, own.k, own.scale, lse, columns, distances, *about, *strides,
        *columns.stride()[:2], lse.shape[2], chunks, pages, scale * LOG2_E, kv.ratio,
        PAGE=size, DIM=dim, FP8=own.form, **options,
        enable_fp_fusion=True,
    )  # fmt: skip
    _join_distances[(triton.cdiv(pages * size, OFFSETS), heads, len(rows))](
        distances, diagonals, spans.seq, spans.pos, spans.count,
        *diagonals.stride()[:2], chunks, pages, kv.ratio,
        PAGE=size, M=options["M"], OFFSETS=OFFSETS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return columns, diagonals


@triton.jit(do_not_specialize=VARYING)
def _row_lse(
    q_ptr, k_ptr, scales_ptr, part_ptr,
    table_ptr, length_ptr, heads_ptr, sink_ptr, window_ptr, seq_ptr, token_ptr, pos_ptr, queries_ptr,
    q_t, q_h, k_g, k_p, k_s, scales_g, scales_p, table_b, rule_b,
    groups, rows, pieces, scale, ratio,
    M: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """part [spans, G, rows, pieces]; row m of a span is its query m // ratio, head m % ratio of the group."""
    b, g = tl.program_id(2) // groups, tl.program_id(2) % groups
    seq, pos, queries = tl.load(seq_ptr + b), tl.load(pos_ptr + b), tl.load(queries_ptr + b)
    pages = (pos + queries - 1) // PAGE + 1
    first = tl.program_id(0) * PIECE
    row = tl.program_id(1) * M + tl.arange(0, M)
    real = row < queries * ratio
    query = tl.minimum(row // ratio, queries - 1)
    head = (tl.load(heads_ptr + g) * ratio + row % ratio).to(tl.int64)
    token = (tl.load(token_ptr + b) + query).to(tl.int64)
    q = load_rows(q_ptr, token * q_t + head * q_h, real, True, DIM, WIDE)
    if not FP8:
        q = q.to(k_ptr.dtype.element_ty)
    sink, window = tl.load(sink_ptr + seq * rule_b + g), tl.load(window_ptr + seq * rule_b + g)
    length = tl.load(length_ptr + seq)
    at, s = (pos + query)[:, None], tl.arange(0, PAGE)
    k_ptr += g.to(tl.int64) * k_g
    scales_ptr += g.to(tl.int64) * scales_g
    table_ptr += seq.to(tl.int64) * table_b

    best = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for page in range(first, tl.minimum(first + PIECE, pages)):
        physical = tl.load(table_ptr + page).to(tl.int64)
        key = page * PAGE + s
        there = key < tl.where(physical >= 0, length, 0)
        k = load_rows(k_ptr + tl.maximum(physical, 0) * k_p, s.to(tl.int64) * k_s, there, True, DIM, WIDE)
        if FP8:
            k = widen(k, q.dtype, FP8)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if FP8:
            scores *= load_scales(scales_ptr + tl.maximum(physical, 0) * scales_p + s, there, True, FP8)[None]
        visible = there[None] & (key[None] <= at) & ((key[None] > at - window) | (key[None] < sink))
        scores = tl.where(visible, scores, -float("inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp2(best - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        best = top
    part_at = part_ptr + ((tl.program_id(2).to(tl.int64) * rows) + row) * pieces + tl.program_id(0)
    lse = (best + tl.log2(tl.maximum(total, 1.0))) * LN_2  # a sum that is not empty is at least 1
    tl.store(part_at, tl.where(total > 0, lse, -float("inf")), mask=real)


@triton.jit(do_not_specialize=VARYING)
def _page_sums(
    q_ptr, k_ptr, scales_ptr, lse_ptr, out_ptr, part_ptr,
    table_ptr, length_ptr, heads_ptr, sink_ptr, window_ptr, seq_ptr, token_ptr, pos_ptr, queries_ptr,
    q_t, q_h, k_g, k_p, k_s, scales_g, scales_p, table_b, rule_b,
    out_g, out_b, rows, chunks, pages, scale, ratio,
    M: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """lse [spans, G, rows]; out [G, B, ...]: the sums by key; part [spans, G, chunks of M queries, pages, 2 * PAGE]:
    the sums by distance, entry u over the query i of the chunk and key s of the page with i - s == u - (PAGE - 1)."""
    page, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, pos, queries = tl.load(seq_ptr + b), tl.load(pos_ptr + b), tl.load(queries_ptr + b)
    if page * PAGE > pos + queries - 1:
        return
    sink, window = tl.load(sink_ptr + seq * rule_b + g), tl.load(window_ptr + seq * rule_b + g)
    i, s = tl.arange(0, M), tl.arange(0, PAGE)
    key = page * PAGE + s
    physical = tl.load(table_ptr + seq.to(tl.int64) * table_b + page).to(tl.int64)
    there = key < tl.where(physical >= 0, tl.load(length_ptr + seq), 0)
    k_at = g.to(tl.int64) * k_g + tl.maximum(physical, 0) * k_p
    k = load_rows(k_ptr + k_at, s.to(tl.int64) * k_s, there, True, DIM, WIDE)
    if FP8:
        k = widen(k, q_ptr.dtype.element_ty, FP8)
        scales_at = scales_ptr + g.to(tl.int64) * scales_g + tl.maximum(physical, 0) * scales_p + s
        k_scale = load_scales(scales_at, there, True, FP8)
    k = tl.trans(k)
    first_token, first_head = tl.load(token_ptr + b), tl.load(heads_ptr + g) * ratio
    span = b.to(tl.int64) * tl.num_programs(1) + g

    by_key = tl.zeros((PAGE,), tl.float32)
    for c in range(0, tl.cdiv(queries, M)):
        query = c * M + i
        real = query < queries
        at = (pos + query)[:, None]
        token = (first_token + query).to(tl.int64)
        visible = there[None] & real[:, None] & (key[None] <= at) & ((key[None] > at - window) | (key[None] < sink))
        weights = tl.zeros((M, PAGE), tl.float32)
        for j in range(0, ratio):
            q_at = token * q_t + (first_head + j).to(tl.int64) * q_h
            q = load_rows(q_ptr, q_at, real, True, DIM, WIDE).to(k.dtype)
            lse = tl.load(lse_ptr + span * rows + query * ratio + j, mask=real, other=0.0) * (1.0 / LN_2)
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if FP8:
                scores *= k_scale[None]
            weights += tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        by_key += tl.sum(weights, 0)
        # Rotate each row by its number, so that a distance is a column; what went round the end is PAGE farther.
        rotated = tl.gather(weights, (i[:, None] + (PAGE - 1) - s[None]) % PAGE, 1)
        part_at = part_ptr + ((span * chunks + c) * pages + page) * 2 * PAGE + s
        tl.store(part_at, tl.sum(tl.where(i[:, None] <= s[None], rotated, 0.0), 0))
        tl.store(part_at + PAGE, tl.sum(tl.where(i[:, None] > s[None], rotated, 0.0), 0))
    out_at = out_ptr + g.to(tl.int64) * out_g + seq.to(tl.int64) * out_b
    tl.store(out_at + key, by_key / (queries * ratio).to(tl.float32))


@triton.jit(do_not_specialize=VARYING)
def _join_distances(
    part_ptr, out_ptr, seq_ptr, pos_ptr, queries_ptr,
    out_g, out_b, chunks, pages, ratio,
    PAGE: tl.constexpr, M: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """part as _page_sums leaves it -> out [G, B, ...], by distance."""
    g, b = tl.program_id(1), tl.program_id(2)
    seq, pos, queries = tl.load(seq_ptr + b), tl.load(pos_ptr + b), tl.load(queries_ptr + b)
    distance = tl.program_id(0) * OFFSETS + tl.arange(0, OFFSETS)
    last = (pos + queries - 1) // PAGE
    part_ptr += (b.to(tl.int64) * tl.num_programs(1) + g) * chunks * pages * 2 * PAGE
    total = tl.zeros((OFFSETS,), tl.float32)
    for c in range(0, tl.cdiv(queries, M)):
        key = pos + c * M - distance  # what the chunk's first query has at this distance: below 0 for later queries
        page = (key + PAGE) // PAGE - 1
        u = PAGE - 1 - (key + PAGE) % PAGE
        here, after = (key >= 0) & (page <= last), (key >= -PAGE) & (page < last)
        at = part_ptr + (c * pages + page) * 2 * PAGE + u
        total += tl.load(at, mask=here, other=0.0)
        total += tl.load(at + 3 * PAGE, mask=after, other=0.0)  # the next page's entry u + PAGE
    out_at = out_ptr + g.to(tl.int64) * out_g + seq.to(tl.int64) * out_b
    tl.store(out_at + distance, total / (queries * ratio).to(tl.float32), mask=distance < pos + queries)
