"""One program per (128 packed rows of a query block, KV head): a running softmax over the block's run of pages.

Packed row m is query m // ratio of the block, head m % ratio of the group, so that each key is read once per group.
"""

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.triton.fp8 import add_fp8_keys, stored
from gossamer.kernels.triton.page_loads import descriptors_fit, load_page, page_descriptors
from gossamer.kernels.triton.tiles import (
    LN_2,
    VARYING,
    add_keys,
    add_sink,
    capability,
    factors,
    load_rows,
    register_limit,
)
from gossamer.kernels.triton.tuned import tuned


def tile(dim: int, itemsize: int, rows: int, *, tokens: bool, capability: int, fp8: bool = False) -> dict[str, int]:
    """Rows per program, how pages are loaded, how many programs should share a multiprocessor, and compiler options,
    for `rows` packed rows and a GPU's compute capability (80, 90, ...).

    Pages are loaded by pointers, and through tensor descriptors (TMA) only where a GPU's file of tiles says that this
    was measured to be faster: docs/architecture.md has what the compiler makes of both. These tiles fill the registers
    without spilling and fit the shared memory, to which tests/test_kernels_compile.py holds them. float32 runs without
    tensor cores and is there to be right, not fast.
    """
    wide = max(16, triton.next_power_of_2(dim))
    if itemsize == 4:
        most, warps, stages = (32, 8, 1) if wide <= 64 else (16, 8 if wide <= 128 else 16, 1)
    elif wide <= 64:
        most, warps, stages = 128, 8, 4
    elif wide <= 128:
        most, warps = 128 if capability >= 90 and not (fp8 and capability >= 100) else 64, 8
        stages = 3 if fp8 and tokens and capability >= 90 else 4  # a fourth spills with softcap and sinks
    else:
        most, warps, stages = 64 if capability >= 90 and not tokens and not fp8 else 32, 8, 2
    block = min(most, max(16, triton.next_power_of_2(rows)))
    warps = warps if block == most else 4
    return {"M": block, "WIDE": wide, "num_warps": warps, "num_stages": stages, "TMA": 0, "per_sm": 1}


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
    """As gossamer.kernels.paged_prefill.paged_prefill."""
    dim, rows = q.shape[2], blocks.size * kv.ratio
    tokens = index.tokens is not None
    own, item = stored(q, kv), kv.k.element_size()
    options = tile(dim, own.itemsize, rows, tokens=tokens, capability=capability(q.device), fp8=own.form > 0)
    most = max(16, triton.next_power_of_2(rows))
    options = tuned("paged_prefill", options, q.device, most=most, dim=dim, bytes=item, tokens=tokens)
    if options["TMA"] and not descriptors_fit(kv, capability(q.device)):
        options["TMA"] = 0
    pages = page_descriptors(kv, options["WIDE"]) if options["TMA"] else (None, None)
    options |= register_limit(options.pop("per_sm"), options["num_warps"])
    groups, parts = kv.heads.numel(), triton.cdiv(rows, options["M"])
    singles = (
        (index.token_start, index.token_count, index.tokens) if tokens else (index.start, index.count, index.pages)
    )
    token_stride = index.token_start.stride(0) if index.token_start is not None else 0
    _paged_prefill[(len(blocks) * parts * groups,)](
        q, own.k, own.v, own.scale, *pages, out, lse, index.start if sinks is None else sinks,
        kv.table, kv.length, kv.heads, kv.sink, kv.window,
        blocks.seq, blocks.token, blocks.pos, blocks.count,
        index.start, index.count, index.pages,
        *singles,
        *q.stride()[:2], *out.stride()[:2], *lse.stride(), *kv.k.stride()[:3], *kv.v.stride()[:3], *own.strides,
        kv.table.stride(0), kv.sink.stride(0), index.start.stride(0), token_stride,
        *factors(scale, softcap), kv.ratio, groups, parts,
        PAGE=kv.page_size, DIM=dim, TOKENS=tokens, SOFTCAP=softcap > 0, SINKS=sinks is not None,
        FP8=own.form, **options,
        enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _paged_prefill(
    q_ptr, k_ptr, v_ptr, scales_ptr, k_pages, v_pages, out_ptr, lse_ptr, sinks_ptr,
    table_ptr, length_ptr, heads_ptr, sink_ptr, window_ptr,
    seq_ptr, token_ptr, pos_ptr, queries_ptr,
    start_ptr, count_ptr, pages_ptr, token_start_ptr, token_count_ptr, tokens_ptr,
    q_t, q_h, out_t, out_h, lse_t, lse_h, k_g, k_p, k_s, v_g, v_p, v_s, scales_v, scales_g, scales_p,
    table_b, rule_b, index_g, token_g,
    scale, cap, ratio, groups, parts,
    M: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # Later blocks read more: they start first, of all heads, so that the last program to start has little to do.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    g, n, part = program % groups, program // groups // parts, program // groups % parts
    seq, pos, queries = tl.load(seq_ptr + n), tl.load(pos_ptr + n), tl.load(queries_ptr + n)
    if part * M >= queries * ratio:
        return
    first_head, first_token = tl.load(heads_ptr + g) * ratio, tl.load(token_ptr + n)
    real, query, member = _rows(part * M, queries, ratio, M)
    head, token = (first_head + member).to(tl.int64), (first_token + query).to(tl.int64)
    d, s = tl.arange(0, WIDE), tl.arange(0, PAGE)
    in_head = d < DIM
    q = tl.load(q_ptr + (token * q_t + head * q_h)[:, None] + d[None], mask=in_head[None], other=0.0)
    if not FP8:
        q = q.to(k_ptr.dtype.element_ty)

    sink, window = tl.load(sink_ptr + seq * rule_b + g), tl.load(window_ptr + seq * rule_b + g)
    length = tl.load(length_ptr + seq)
    at = (pos + query)[:, None]
    k_ptr += g.to(tl.int64) * k_g
    v_ptr += g.to(tl.int64) * v_g
    scales_ptr += g.to(tl.int64) * scales_g
    table_ptr += seq.to(tl.int64) * table_b
    run = pages_ptr + tl.load(start_ptr + g * index_g + n)
    count = tl.load(count_ptr + g * index_g + n)

    best = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDE), tl.float32)

    # Pages before the own ones are seen whole unless the window cuts somewhere.
    own = (pos + queries - 1) // PAGE - pos // PAGE + 1
    cut = tl.load(run) * PAGE <= pos + queries - 1 - window
    clear = tl.where(cut, 0, tl.maximum(count - own, 0))
    for i in range(0, clear):
        physical = tl.load(table_ptr + tl.load(run + i)).to(tl.int64)
        k = load_page(k_pages, k_ptr, g, physical, k_p, k_s, real, False, PAGE, DIM, WIDE, TMA)
        v = load_page(v_pages, v_ptr, g, physical, v_p, v_s, real, False, PAGE, DIM, WIDE, TMA)
        if FP8:
            scales = scales_ptr + physical * scales_p + s
            best, total, acc = add_fp8_keys(
                q, k, v, scales, scales_v, real, best, total, acc, real[:, None], scale, cap, False, SOFTCAP, FP8
            )
        else:
            best, total, acc = add_keys(q, k, v, best, total, acc, real[:, None], scale, cap, False, SOFTCAP)
    for i in range(clear, count):
        page = tl.load(run + i)
        physical = tl.load(table_ptr + page).to(tl.int64)
        key = page * PAGE + s
        # Of keys that nobody sees no score counts, whatever they are; values, even times zero, have to be numbers.
        k = load_page(k_pages, k_ptr, g, physical, k_p, k_s, key < length, not TMA, PAGE, DIM, WIDE, TMA)
        v = load_page(v_pages, v_ptr, g, physical, v_p, v_s, key < length, True, PAGE, DIM, WIDE, TMA)
        visible = (key[None] <= at) & ((key[None] > at - window) | (key[None] < sink))
        if FP8:
            scales = scales_ptr + physical * scales_p + s
            best, total, acc = add_fp8_keys(
                q, k, v, scales, scales_v, key < length, best, total, acc, visible, scale, cap, True, SOFTCAP, FP8
            )
        else:
            best, total, acc = add_keys(q, k, v, best, total, acc, visible, scale, cap, True, SOFTCAP)
    if TOKENS:
        token_run = tokens_ptr + tl.load(token_start_ptr + g * token_g + n)
        token_count = tl.load(token_count_ptr + g * token_g + n)
        for i in range(0, token_count, PAGE):
            listed = i + s < token_count
            key = tl.load(token_run + i + s, mask=listed, other=0)
            listed &= key < length
            physical = tl.load(table_ptr + key // PAGE, mask=listed, other=0).to(tl.int64)
            k = load_rows(k_ptr, physical * k_p + (key % PAGE) * k_s, listed, True, DIM, WIDE)
            v = load_rows(v_ptr, physical * v_p + (key % PAGE) * v_s, listed, True, DIM, WIDE)
            visible = listed[None] & (key[None] <= at) & ((key[None] > at - window) | (key[None] < sink))
            if FP8:
                scales = scales_ptr + physical * scales_p + key % PAGE
                best, total, acc = add_fp8_keys(
                    q, k, v, scales, scales_v, listed, best, total, acc, visible, scale, cap, True, SOFTCAP, FP8
                )
            else:
                best, total, acc = add_keys(q, k, v, best, total, acc, visible, scale, cap, True, SOFTCAP)

    # What the compiler cannot know to be the same numbers it computes again; it would keep them all through the loops.
    again = part * M + tl.load(queries_ptr + n, volatile=True) - queries
    real, query, member = _rows(again, queries, ratio, M)
    head, token = (first_head + member).to(tl.int64), (first_token + query).to(tl.int64)
    if SINKS:
        best, total, decay = add_sink(best, total, tl.load(sinks_ptr + head))
        acc = acc * decay[:, None]
    out_at = out_ptr + (token * out_t + head * out_h)[:, None] + d[None]
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None] & in_head[None])
    tl.store(lse_ptr + token * lse_t + head * lse_h, (best + tl.log2(total)) * LN_2, mask=real)


@triton.jit
def _rows(begin, queries, ratio, M: tl.constexpr):
    """Of M packed rows from `begin` on: whether they are any, and which query and head of the group."""
    row = begin + tl.arange(0, M)
    return row < queries * ratio, tl.minimum(row // ratio, queries - 1), row % ratio
