"""Two kernels: one marks the pages of each run, one per (128 packed rows of a query block, KV head) runs a softmax over
the mean keys of the others and merges it into what is there."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.triton.tiles import LN_2, VARYING, add_keys, capability, factors, load_rows

COLUMNS = 256  # entries of a run that are marked together
PAGES = 64  # mean keys that are read together


def tile(dim: int, itemsize: int, rows: int, capability: int) -> dict[str, int]:
    """Rows per program and compiler options for `rows` packed rows and a GPU's compute capability: full registers,
    nothing spilled, to which the tests hold them. float32 is there to be right, not fast."""
    wide = max(16, triton.next_power_of_2(dim))
    block = max(16, triton.next_power_of_2(rows))
    if itemsize == 4:
        block = 32 if wide <= 64 or (wide <= 128 and capability >= 90) else 16
        return {"M": block, "WIDE": wide, "num_warps": 8 if wide <= 128 else 16, "num_stages": 1}
    if wide <= 64:
        most = 128
    elif wide <= 128:
        most = 128 if capability >= 90 else 64
    else:
        most = 32
    return {"M": min(most, block), "WIDE": wide, "num_warps": 8 if block >= most else 4, "num_stages": 2}


def launch(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    index: SparseIndex,
    out: Tensor,
    lse: Tensor,
    mean_k: Tensor,
    mean_v: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> None:
    """As gossamer.kernels.dropped_pages.add_dropped_pages, for at least one block."""
    heads, width, dim, rows = kv.heads.numel(), kv.table.shape[1], q.shape[2], blocks.size * kv.ratio
    assert mean_k.dtype == mean_v.dtype and mean_k.stride(-1) == mean_v.stride(-1) == 1
    read = torch.zeros(heads, len(blocks), width, dtype=torch.int32, device=q.device)
    _mark[(len(blocks), heads)](
        read, index.start, index.count, index.pages, index.start.stride(0), width, COLUMNS=COLUMNS,
        enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
    )  # fmt: skip
    options = tile(dim, mean_k.element_size(), rows, capability(q.device))
    _add_dropped_pages[(len(blocks) * triton.cdiv(rows, options["M"]), heads)](
        q, mean_k, mean_v, out, lse, read,
        kv.table, kv.heads, kv.sink, kv.window, blocks.seq, blocks.token, blocks.pos, blocks.count,
        *q.stride()[:2], *out.stride()[:2], *lse.stride(), *mean_k.stride()[:2], *mean_v.stride()[:2],
        kv.table.stride(0), kv.sink.stride(0), width, blocks.size,
        *factors(scale, softcap), kv.ratio, triton.cdiv(rows, options["M"]),
        PAGE=kv.page_size, DIM=dim, PAGES=PAGES, LOG_PAGE=math.log(kv.page_size), SOFTCAP=softcap > 0, **options,
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _mark(read_ptr, start_ptr, count_ptr, pages_ptr, index_g, width, COLUMNS: tl.constexpr):
    """read [G, N, width]: 1 for the pages in the run of (g, n)."""
    n, g = tl.program_id(0), tl.program_id(1)
    run = pages_ptr + tl.load(start_ptr + g * index_g + n)
    count = tl.load(count_ptr + g * index_g + n)
    read_ptr += (g.to(tl.int64) * tl.num_programs(0) + n) * width
    for i in range(0, count, COLUMNS):
        entry = i + tl.arange(0, COLUMNS)
        page = tl.load(run + entry, mask=entry < count, other=0)
        tl.store(read_ptr + page, 1, mask=entry < count)


@triton.jit(do_not_specialize=VARYING)
def _add_dropped_pages(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, read_ptr,
    table_ptr, heads_ptr, sink_ptr, window_ptr, seq_ptr, token_ptr, pos_ptr, queries_ptr,
    q_t, q_h, out_t, out_h, lse_t, lse_h, k_g, k_p, v_g, v_p,
    table_b, rule_b, width, size,
    scale, cap, ratio, parts,
    M: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, PAGES: tl.constexpr,
    LOG_PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    # Later blocks have more pages: they start first.
    n = (tl.num_programs(0) - 1 - tl.program_id(0)) // parts
    part = (tl.num_programs(0) - 1 - tl.program_id(0)) % parts
    g = tl.program_id(1)
    seq, pos, queries = tl.load(seq_ptr + n), tl.load(pos_ptr + n), tl.load(queries_ptr + n)
    if part * M >= queries * ratio:
        return
    row = part * M + tl.arange(0, M)
    real = row < queries * ratio
    query = tl.minimum(row // ratio, queries - 1)
    head = (tl.load(heads_ptr + g) * ratio + row % ratio).to(tl.int64)
    token = (tl.load(token_ptr + n) + query).to(tl.int64)
    q = load_rows(q_ptr, token * q_t + head * q_h, real, True, DIM, WIDE).to(k_ptr.dtype.element_ty)

    sink, window = tl.load(sink_ptr + seq * rule_b + g), tl.load(window_ptr + seq * rule_b + g)
    unseen = pos + queries - 1 - window  # the last position behind some query's window
    k_ptr += g.to(tl.int64) * k_g
    v_ptr += g.to(tl.int64) * v_g
    table_ptr += seq.to(tl.int64) * table_b
    read_ptr += (g.to(tl.int64) * (tl.num_programs(0) // parts) + n) * width
    past = pos // size * size // PAGE

    best = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDE), tl.float32)
    for first in range(0, past, PAGES):
        page = first + tl.arange(0, PAGES)
        physical = tl.load(table_ptr + page, mask=page < past, other=-1).to(tl.int64)
        kept = tl.load(read_ptr + page, mask=page < past, other=1) != 0
        whole = (tl.maximum(page * PAGE, sink) > unseen) | ((page + 1) * PAGE <= sink)
        dropped = (physical >= 0) & whole & (kept == 0)
        physical = tl.maximum(physical, 0)
        k = load_rows(k_ptr, physical * k_p, dropped, True, DIM, WIDE)
        v = load_rows(v_ptr, physical * v_p, dropped, True, DIM, WIDE)
        best, total, acc = add_keys(q, k, v, best, total, acc, dropped[None], scale, cap, True, SOFTCAP)

    changed = real & (total > 0)
    total = tl.where(changed, total, 1.0)
    added = tl.where(changed, (best + tl.log2(total)) * LN_2 + LOG_PAGE, 0.0)
    lse_at = lse_ptr + token * lse_t + head * lse_h
    before = tl.load(lse_at, mask=changed, other=0.0)
    top = tl.maximum(before, added)
    after = top + tl.log(tl.exp(before - top) + tl.exp(added - top))
    d = tl.arange(0, WIDE)
    out_at = out_ptr + (token * out_t + head * out_h)[:, None] + d[None]
    mask = changed[:, None] & (d < DIM)[None]
    value = tl.load(out_at, mask=mask, other=0.0).to(tl.float32) * tl.exp(before - after)[:, None]
    value += acc * (tl.exp(added - after) / total)[:, None]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_at, after, mask=changed)
