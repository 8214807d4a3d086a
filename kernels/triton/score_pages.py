"""Three passes over the past columns (pages, or tokens for score_tokens.py) of each query block.

`_sum_pieces`: for each packed row and each piece of columns, the logarithm of the sum of exponentials.
`_share_columns`: with these, each column's softmax; mean over the queries, maximum over the heads.
`_normalise`: divides by the block's sum.

Pieces and tiles have a fixed size and are added in order, so that a block's result never depends on what else is in
the batch. Packed row m is query m // HEADS of the block, head m % HEADS of the group: a power of two, so that the rows
of a head can be added up by a reshape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.layout import NULL_PAGE, PagedKV, QueryBlocks
from gossamer.kernels.triton.tiles import LOG2_E, VARYING
from gossamer.kernels.triton.tuned import tuned

PIECE = 4096  # columns whose exponentials one program adds up
CHUNK = 1024  # columns that one program divides


def launch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, keys: Tensor, *, scale: float) -> Tensor:
    """As gossamer.kernels.score_pages.page_mass."""
    return mass(q, kv, blocks, keys, (*keys.stride()[:2], 0, 0, 0), dim=keys.shape[2], scale=scale)


def launch_bounds(q: Tensor, kv: PagedKV, blocks: QueryBlocks, bounds: Tensor, *, scale: float) -> Tensor:
    """As gossamer.kernels.score_pages.bound_mass."""
    g, p, c, side, _ = bounds.stride()
    return mass(q, kv, blocks, bounds, (g, p, 0, c, side), dim=bounds.shape[4], subs=bounds.shape[2], scale=scale)


def mass(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    keys: Tensor,
    strides: tuple[int, ...],  # of head, page, token, stretch, minimum or maximum
    *,
    dim: int,  # of a key
    scale: float,
    per_page: int = 1,  # columns in a page
    subs: int = 0,  # stretches with bounds in a page
    channels: Tensor | None = None,  # [G, dim] int32, contiguous: which of q's entries meet the key's
) -> Tensor:
    """[G, N, L * per_page] float32."""
    groups, num, width = kv.heads.numel(), len(blocks), kv.table.shape[1] * per_page
    out = torch.empty(groups, num, width, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    assert q.stride(-1) == keys.stride(-1) == 1
    itemsize = keys.element_size() if q.dtype == keys.dtype else 4  # where they differ, both are widened
    options = tile(dim, itemsize, blocks.size, kv.ratio, bounds=subs > 0)
    what = {
        "dim": dim,
        "bytes": itemsize,
        "single": blocks.size == 1,
        "subs": subs,
        "tokens": per_page > 1,
        "heads": options["HEADS"],
    }
    options = tuned("score_pages", options, q.device, **what)
    parts = triton.cdiv(blocks.size * options["HEADS"], options["M"])
    pieces, tiles = triton.cdiv(width, PIECE), triton.cdiv(width, options["COLUMNS"])
    rows = parts * options["M"]
    lse = torch.empty(pieces, groups, num, rows, dtype=torch.float32, device=q.device)
    sums = torch.empty(groups, num, tiles, dtype=torch.float32, device=q.device)
    sizes = {"PIECE": PIECE, "PAGE": kv.page_size, "PER_PAGE": per_page}
    flags = sizes | {"DIM": dim, "CHANNELS": channels is not None, "SUBS": subs, "RELEASED": NULL_PAGE}
    read = (
        q, keys, blocks.seq if channels is None else channels,
        kv.table, kv.heads, blocks.seq, blocks.token, blocks.pos, blocks.count,
        *q.stride()[:2], *strides, kv.table.stride(0), LOG2_E * scale, kv.ratio, blocks.size, num, rows,
    )  # fmt: skip
    # One query's products take less time to read again than the keys; many queries' less to compute again. For single
    # tokens they would be more than the labels.
    stored = blocks.size == 1 and per_page == 1
    logits = torch.empty(groups, num, options["HEADS"], width, dtype=torch.float32, device=q.device) if stored else lse
    flags["STORED"] = stored
    # Fusion is said aloud, because Triton's default is about to change.
    _sum_pieces[(num * parts, pieces, groups)](
        lse, logits, *read, width, parts, **flags, **options, enable_fp_fusion=True
    )
    _share_columns[(num * tiles, groups)](
        out, sums, lse, logits, *read, width, tiles, **flags, **options, enable_fp_fusion=True
    )
    _normalise[(num * triton.cdiv(width, CHUNK), groups)](
        out, sums, blocks.pos, blocks.size, num, width, tiles,
        PAGE=kv.page_size, PER_PAGE=per_page, COLUMNS=options["COLUMNS"], CHUNK=CHUNK, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def tile(dim: int, itemsize: int, size: int, ratio: int, *, bounds: bool = False) -> dict[str, int]:
    """Packed rows and columns of a program, and compiler options, for blocks of `size` queries of `ratio` heads.

    These fill no more than the registers and the shared memory, to which tests/test_kernels_compile.py holds
    them. float32 runs without tensor cores and is there to be right, not fast.
    """
    wide, heads = max(16, triton.next_power_of_2(dim)), triton.next_power_of_2(ratio)
    if itemsize == 4:
        most, columns = (16 if bounds or wide > 128 else 32), (16 if bounds and wide > 128 else 32)
    elif bounds:
        most, columns = (128, 64) if wide <= 64 else (64 if wide <= 128 else 32, 32)
    else:
        most, columns = 128 if wide <= 128 else 64, 64
    block = max(16, heads, min(most, triton.next_power_of_2(size) * heads))
    large = itemsize == 4 or block >= 64 or wide > 128
    return {
        "M": block,
        "HEADS": heads,
        "COLUMNS": columns,
        "WIDE": wide,
        "num_warps": 8 if large else 4,
        "num_stages": 1 if itemsize == 4 else 2,
    }


@triton.jit
def _load_queries(
    q_ptr, channel, token, count, head, m, q_t, q_h, ratio, inside, WIDEN: tl.constexpr, HEADS: tl.constexpr
):
    """Rows m [M] of a block whose first head is `head`: [M, WIDE], zero where the block has no such row."""
    query = m // HEADS
    real = (query < count) & (m % HEADS < ratio)
    at = (token + query).to(tl.int64) * q_t + (head + m % HEADS).to(tl.int64) * q_h
    q = tl.load(q_ptr + at[:, None] + channel[None], mask=real[:, None] & inside[None], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    return q


@triton.jit
def _load_keys(ptr, d, there, inside, DIM: tl.constexpr, CHANNELS: tl.constexpr, WIDEN: tl.constexpr):
    """[COLUMNS, WIDE] at ptr [COLUMNS], zero where not there."""
    k = tl.load(ptr[:, None] + d[None], mask=there[:, None] & (d < DIM)[None], other=0.0)
    if CHANNELS:  # not by the mask above, with which each number would be loaded by itself
        k = tl.where(inside[None], k, 0.0).to(k.dtype)
    if WIDEN:
        k = k.to(tl.float32)
    return k


@triton.jit
def _logits(
    q, keys_ptr, table_ptr, column, stop, d, inside, k_p, k_s, k_c, k_e, scale,
    PER_PAGE: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, SUBS: tl.constexpr, RELEASED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits [M, COLUMNS] in base 2, -inf for columns that are not past."""
    physical = tl.load(table_ptr + column // PER_PAGE, mask=column < stop, other=RELEASED)
    there = physical != RELEASED
    ptr = keys_ptr + physical.to(tl.int64) * k_p + (column % PER_PAGE).to(tl.int64) * k_s
    if SUBS == 0:
        keys = _load_keys(ptr, d, there, inside, DIM, CHANNELS, WIDEN)
        products = tl.dot(q, tl.trans(keys), input_precision="ieee")
    else:
        # The minimum counts where q is negative, the maximum where it is positive.
        below, above = tl.where(q < 0, q, 0.0).to(q.dtype), tl.where(q > 0, q, 0.0).to(q.dtype)
        products = tl.full((q.shape[0], column.shape[0]), -float("inf"), tl.float32)
        for c in range(SUBS):
            low = _load_keys(ptr + c * k_c, d, there, inside, DIM, CHANNELS, WIDEN)
            high = _load_keys(ptr + c * k_c + k_e, d, there, inside, DIM, CHANNELS, WIDEN)
            bound = tl.dot(below, tl.trans(low), input_precision="ieee")
            bound = tl.dot(above, tl.trans(high), bound, input_precision="ieee")
            products = tl.maximum(products, bound)
    return tl.where(there[None], products * scale, -float("inf"))


@triton.jit(do_not_specialize=VARYING)
def _sum_pieces(
    lse_ptr, logits_ptr, q_ptr, keys_ptr, channels_ptr,
    table_ptr, heads_ptr, seq_ptr, token_ptr, pos_ptr, count_ptr,
    q_t, q_h, k_g, k_p, k_s, k_c, k_e, table_b, scale, ratio, size, num, rows, width, parts,
    M: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, PIECE: tl.constexpr,
    PAGE: tl.constexpr, PER_PAGE: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, SUBS: tl.constexpr,
    RELEASED: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    n, part, piece, g = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1), tl.program_id(2)
    limit = tl.load(pos_ptr + n) // size * size // PAGE * PER_PAGE
    count = tl.load(count_ptr + n)
    if (piece * PIECE >= limit) | (part * M >= count * HEADS):
        return  # nobody will ask
    WIDEN: tl.constexpr = q_ptr.dtype.element_ty != keys_ptr.dtype.element_ty
    d = tl.arange(0, WIDE)
    channel, inside = d, d < DIM
    if CHANNELS:
        channel = tl.load(channels_ptr + g * DIM + d, mask=inside, other=-1)
        inside = channel >= 0
    m = part * M + tl.arange(0, M)
    head = tl.load(heads_ptr + g) * ratio
    token = tl.load(token_ptr + n)
    q = _load_queries(q_ptr, channel, token, count, head, m, q_t, q_h, ratio, inside, WIDEN, HEADS)
    keys_ptr += g.to(tl.int64) * k_g
    table_ptr += tl.load(seq_ptr + n).to(tl.int64) * table_b

    best = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    stop = tl.minimum((piece + 1) * PIECE, limit)
    for begin in range(piece * PIECE, stop, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        scores = _logits(
            q, keys_ptr, table_ptr, column, stop, d, inside, k_p, k_s, k_c, k_e, scale,
            PER_PAGE, DIM, CHANNELS, SUBS, RELEASED, WIDEN,
        )  # fmt: skip
        if STORED:
            line = ((g.to(tl.int64) * num + n) * HEADS + m) * width
            there = (m < HEADS)[:, None] & (column < stop)[None]
            tl.store(logits_ptr + line[:, None] + column[None], scores, mask=there)
        top = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)  # all released so far
        total = total * tl.exp2(best - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        best = top
    lse = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    place = ((piece * tl.num_programs(2) + g).to(tl.int64) * num + n) * rows
    tl.store(lse_ptr + place + m, lse)


@triton.jit(do_not_specialize=VARYING)
def _share_columns(
    out_ptr, sums_ptr, lse_ptr, logits_ptr, q_ptr, keys_ptr, channels_ptr,
    table_ptr, heads_ptr, seq_ptr, token_ptr, pos_ptr, count_ptr,
    q_t, q_h, k_g, k_p, k_s, k_c, k_e, table_b, scale, ratio, size, num, rows, width, tiles,
    M: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, PIECE: tl.constexpr,
    PAGE: tl.constexpr, PER_PAGE: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, SUBS: tl.constexpr,
    RELEASED: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    n, tile, g = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    limit = tl.load(pos_ptr + n) // size * size // PAGE * PER_PAGE
    block = g.to(tl.int64) * num + n
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    out_ptr += block * width + column
    if tile * COLUMNS >= limit:
        tl.store(out_ptr, tl.zeros((COLUMNS,), tl.float32), mask=column < width)
        return
    WIDEN: tl.constexpr = q_ptr.dtype.element_ty != keys_ptr.dtype.element_ty
    d = tl.arange(0, WIDE)
    channel, inside = d, d < DIM
    if CHANNELS:
        channel = tl.load(channels_ptr + g * DIM + d, mask=inside, other=-1)
        inside = channel >= 0
    head = tl.load(heads_ptr + g) * ratio
    token, count = tl.load(token_ptr + n), tl.load(count_ptr + n)
    keys_ptr += g.to(tl.int64) * k_g
    table_ptr += tl.load(seq_ptr + n).to(tl.int64) * table_b
    pieces = (limit + PIECE - 1) // PIECE

    shares = tl.zeros((HEADS, COLUMNS), tl.float32)
    for first in range(0, count * HEADS, M):
        m = first + tl.arange(0, M)
        best = tl.full((M,), -float("inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        place = lse_ptr + block * rows + m
        for _ in range(0, pieces):
            lse = tl.load(place)
            place += tl.num_programs(1).to(tl.int64) * num * rows
            top = tl.maximum(best, lse)
            shift = tl.where(top == -float("inf"), 0.0, top)
            total = total * tl.exp2(best - shift) + tl.exp2(lse - shift)
            best = top
        if STORED:
            line = logits_ptr + (block * HEADS + m)[:, None] * width + column[None]
            scores = tl.load(line, mask=(m < HEADS)[:, None] & (column < limit)[None], other=-float("inf"))
        else:
            q = _load_queries(q_ptr, channel, token, count, head, m, q_t, q_h, ratio, inside, WIDEN, HEADS)
            scores = _logits(
                q, keys_ptr, table_ptr, column, limit, d, inside, k_p, k_s, k_c, k_e, scale,
                PER_PAGE, DIM, CHANNELS, SUBS, RELEASED, WIDEN,
            )  # fmt: skip
        shift = tl.where(best == -float("inf"), 0.0, best)
        share = tl.exp2(scores - shift[:, None]) / tl.where(total > 0, total, 1.0)[:, None]
        real = (m // HEADS < count) & (m % HEADS < ratio)
        share = tl.where(real[:, None], share, 0.0)
        shares += tl.sum(tl.reshape(share, (M // HEADS, HEADS, COLUMNS)), 0)
    mass = tl.max(shares, 0) / count
    tl.store(out_ptr, mass, mask=column < width)
    tl.store(sums_ptr + block * tiles + tile, tl.sum(mass, 0))


@triton.jit(do_not_specialize=VARYING)
def _normalise(
    out_ptr, sums_ptr, pos_ptr, size, num, width, tiles,
    PAGE: tl.constexpr, PER_PAGE: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunks = (width + CHUNK - 1) // CHUNK
    n, chunk, g = tl.program_id(0) // chunks, tl.program_id(0) % chunks, tl.program_id(1)
    limit = tl.load(pos_ptr + n) // size * size // PAGE * PER_PAGE
    if chunk * CHUNK >= limit:
        return
    block = g.to(tl.int64) * num + n
    own = (limit + COLUMNS - 1) // COLUMNS
    sums = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, own, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        sums += tl.load(sums_ptr + block * tiles + tile, mask=tile < own, other=0.0)
    total = tl.sum(sums, 0)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    out_ptr += block * width + column
    mass = tl.load(out_ptr, mask=column < limit, other=0.0)
    tl.store(out_ptr, mass / tl.where(total > 0, total, 1.0), mask=column < limit)
