"""Two kernels: one program per (128 query groups, KV head, 64 key groups) writes the logits of pages, one per (query
block, KV head) turns them into mass.

A row is one query group of one query head, rows of a block adjoin; a program takes the rows of several blocks, because
one block has too few of them to be worth reading keys for.
"""

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.triton.fp8 import load_scales, stored, widen
from gossamer.kernels.triton.tiles import LOG2_E, VARYING, load_rows
from gossamer.kernels.triton.tuned import tuned

PART_BYTES = 256 << 20  # logits of pages held at once
KEYS = 64  # key groups per program: no page has more
CELLS = 2048  # of them a program of the second kernel looks at together


def tile(dim: int, itemsize: int, rows: int, stride: int, *, fp8: bool = False) -> dict[str, int]:
    """Rows and key groups per program and compiler options, for `rows` rows in the longest sequence: full registers,
    nothing spilled, to which the tests hold them. float32 is there to be right, not fast."""
    wide = max(16, triton.next_power_of_2(dim))
    if itemsize == 4:
        most, warps, stages = 32, 8, 1
    elif wide <= 128:
        most, warps, stages = 128 if stride <= 16 and not (fp8 and wide == 128) else 64, 8, 3
    else:
        most, warps, stages = 64, 8, 2
    block = min(most, max(16, triton.next_power_of_2(rows)))
    warps = warps if block in (64, most) else 4
    return {"M": block, "KEYS": KEYS, "WIDE": wide, "num_warps": warps, "num_stages": stages}


def mass_tile(groups: int, ratio: int) -> dict[str, int]:
    """Query groups, query heads and pages that a program of the second kernel looks at together."""
    padded, heads = triton.next_power_of_2(groups), triton.next_power_of_2(ratio)
    return {"GROUPS": padded, "HEADS": heads, "COLUMNS": max(1, CELLS // (padded * heads)), "num_warps": 8}


def launch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, stride: int, *, scale: float) -> Tensor:
    """As gossamer.kernels.antidiagonal.antidiagonal_mass, for at least one block."""
    heads, width, dim = kv.heads.numel(), kv.table.shape[1], q.shape[2]
    groups = triton.cdiv(blocks.size, stride)
    rows = groups * kv.ratio
    mass = empty(heads, len(blocks), width, dtype=float32, device=q.device)
    tiles: dict[int, int] = {}
    for row in blocks.rows:
        tiles[row.seq] = tiles.get(row.seq, 0) + 1
    own, item = stored(q, kv), kv.k.element_size()
    options = tile(dim, own.itemsize, max(tiles.values()) * rows, stride, fp8=kv.scale is not None)
    options = tuned("antidiagonal", options, q.device, dim=dim, bytes=item, stride=stride)
    pages = options["KEYS"] * stride // kv.page_size
    most = max(1, PART_BYTES // (4 * heads * rows * width))
    for begin in range(0, len(blocks), most):
        some = slice(begin, begin + most)
        pos, count = blocks.pos[some], blocks.count[some]
        part = empty(heads, pos.numel() * rows, width, dtype=float32, device=q.device)
        _page_logits[(triton.cdiv(part.shape[1], options["M"]), heads, triton.cdiv(width, pages))](
            q, own.k, own.scale, part, kv.table, kv.heads, blocks.seq[some], blocks.token[some], pos, count,
            *q.stride()[:2], *kv.k.stride()[:3], *own.strides[1:], kv.table.stride(0),
            pos.numel(), blocks.size, width, scale * LOG2_E / stride, kv.ratio, rows,
            PAGE=kv.page_size, DIM=dim, STRIDE=stride, FP8=own.form, **options,
            enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
        )  # fmt: skip
        _mass[(pos.numel(), heads)](
            part, mass[:, some], pos, count, mass.stride(0), blocks.size, width, kv.ratio, groups,
            PAGE=kv.page_size, STRIDE=stride, **mass_tile(groups, kv.ratio),
            enable_fp_fusion=True,
        )  # fmt: skip
    return mass


@triton.jit(do_not_specialize=VARYING)
def _page_logits(
    q_ptr, k_ptr, scales_ptr, part_ptr, table_ptr, heads_ptr, seq_ptr, token_ptr, pos_ptr, queries_ptr,
    q_t, q_h, k_g, k_p, k_s, scales_g, scales_p, table_b,
    blocks, size, width, scale, ratio, rows,
    M: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    STRIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """part [G, blocks * rows, width]: the logarithm (base 2) of the sum over each past page's key groups, -inf where
    the page was released; pages that are not past are left alone."""
    PER_PAGE: tl.constexpr = PAGE // STRIDE
    PAGES: tl.constexpr = KEYS // PER_PAGE
    g = tl.program_id(1)
    first_page = tl.program_id(2) * PAGES
    row = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.minimum(row // rows, blocks - 1)
    pos, queries = tl.load(pos_ptr + n), tl.load(queries_ptr + n)
    begin = pos % size  # where the tile's queries begin
    past = tl.where(row < blocks * rows, (pos - begin) // PAGE, 0)
    row_seq = tl.load(seq_ptr + n)
    head = (tl.load(heads_ptr + g) * ratio + row % ratio).to(tl.int64)
    newest = (row % rows) // ratio * STRIDE + STRIDE - 1  # the group's last place, counted from the tile's origin
    q_at = (tl.load(token_ptr + n) - begin + newest).to(tl.int64) * q_t + head * q_h
    # The query `a` places before it is the block's when least <= a < end.
    end, least = newest - begin + 1, newest - begin + 1 - queries
    key, page = tl.arange(0, KEYS), first_page + tl.arange(0, PAGES)
    k_ptr += g.to(tl.int64) * k_g
    scales_ptr += g.to(tl.int64) * scales_g
    part_at = part_ptr + (g.to(tl.int64) * blocks * rows + row) * width

    low = tl.program_id(0) * M // rows
    high = tl.minimum((tl.program_id(0) * M + M - 1) // rows, blocks - 1)
    for i in range(low, high + 1):
        seq = tl.load(seq_ptr + i)
        mine = row_seq == seq
        most = tl.max(tl.where(mine, past, 0), 0)
        seen = (i > low) & (seq == tl.load(seq_ptr + tl.maximum(i - 1, 0)))
        if (most > first_page) & (seen == 0):
            key_page = first_page + key // PER_PAGE
            place = table_ptr + seq.to(tl.int64) * table_b + key_page
            physical = tl.load(place, mask=key_page < most, other=-1)
            k_at = tl.maximum(physical, 0).to(tl.int64) * k_p + (key % PER_PAGE * STRIDE).to(tl.int64) * k_s
            scales_at = tl.maximum(physical, 0).to(tl.int64) * scales_p + key % PER_PAGE * STRIDE
            least_a, end_a = tl.where(mine, least, STRIDE), tl.where(mine, end, 0)
            scores = tl.zeros((M, KEYS), tl.float32)
            for a in range(0, STRIDE):
                q = load_rows(q_ptr - a * q_t, q_at, (least_a <= a) & (a < end_a), True, DIM, WIDE)
                k = load_rows(k_ptr + a * k_s, k_at, physical, False, DIM, WIDE)  # released: page 0, and masked below
                if FP8:
                    products = tl.dot(q, tl.trans(widen(k, q.dtype, FP8)), input_precision="ieee")
                    scores += products * load_scales(scales_ptr + scales_at + a, physical, False, FP8)[None]
                else:
                    scores = tl.dot(q.to(k.dtype), tl.trans(k), scores, input_precision="ieee")
            scores = tl.where((physical >= 0)[None], scores * scale, -float("inf"))
            by_page = tl.reshape(scores, (M, PAGES, PER_PAGE))
            top = tl.max(by_page, 2)
            shift = tl.where(top == -float("inf"), 0.0, top)
            total = tl.sum(tl.exp2(by_page - shift[:, :, None]), 2)
            logit = tl.where(total > 0, shift + tl.log2(tl.maximum(total, 1.0)), -float("inf"))
            tl.store(part_at[:, None] + page[None], logit, mask=mine[:, None] & (page[None] < past[:, None]))


@triton.jit
def _mass(
    part_ptr, out_ptr, pos_ptr, queries_ptr, out_g, size, width, ratio, groups,
    PAGE: tl.constexpr, STRIDE: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """part [G, N * groups * ratio, width] -> out [G, N, width]."""
    n, g = tl.program_id(0), tl.program_id(1)
    pos, queries = tl.load(pos_ptr + n), tl.load(queries_ptr + n)
    past, begin = pos // size * size // PAGE, pos % size
    first, last = begin // STRIDE, (begin + queries - 1) // STRIDE
    row = tl.arange(0, GROUPS * HEADS)
    group, head = row // HEADS, row % HEADS
    real = (group >= first) & (group <= last) & (head < ratio)
    all_rows = (g.to(tl.int64) * tl.num_programs(0) + n) * groups * ratio
    at = part_ptr + (all_rows + group * ratio + head)[:, None] * width
    column = tl.arange(0, COLUMNS)

    best = tl.full((GROUPS * HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((GROUPS * HEADS,), tl.float32)
    for i in range(0, past, COLUMNS):
        there = real[:, None] & (i + column < past)[None]
        logit = tl.load(at + i + column[None], mask=there, other=-float("inf"))
        top = tl.maximum(best, tl.max(logit, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp2(best - shift) + tl.sum(tl.exp2(logit - shift[:, None]), 1)
        best = top
    lse = tl.where(total > 0, best + tl.log2(tl.maximum(total, 1.0)), 0.0)  # where there is something it is at least 1

    whole = 0.0
    for i in range(0, past, COLUMNS):
        there = real[:, None] & (i + column < past)[None]
        logit = tl.load(at + i + column[None], mask=there, other=-float("inf"))
        whole += tl.sum(_most(logit, lse, GROUPS, HEADS, COLUMNS), 0)
    factor = 1.0 / tl.where(whole > 0, whole, 1.0)
    out_at = out_ptr + g.to(tl.int64) * out_g + n.to(tl.int64) * width
    for i in range(0, width, COLUMNS):
        there = real[:, None] & (i + column < past)[None]
        logit = tl.load(at + i + column[None], mask=there, other=-float("inf"))
        held = _most(logit, lse, GROUPS, HEADS, COLUMNS) * factor
        tl.store(out_at + i + column, held, mask=i + column < width)


@triton.jit
def _most(logit, lse, GROUPS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """logit [GROUPS * HEADS, COLUMNS] -> [COLUMNS]: the sum over the groups, and of that the most over the heads."""
    weight = tl.exp2(logit - lse[:, None])
    return tl.max(tl.sum(tl.reshape(weight, (GROUPS, HEADS, COLUMNS)), 0), 0)
