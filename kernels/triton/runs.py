"""One program per row of a selection writes what of it is to be read, pages and tokens, one behind the other."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels import layout
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.triton.tiles import VARYING, along_row

COLUMNS = 4096  # of a row at a time
NULL_PAGE = tl.constexpr(layout.NULL_PAGE)


def launch(pages: Tensor, tokens: Tensor | None, kv: PagedKV, blocks: QueryBlocks) -> SparseIndex:
    """As gossamer.kernels.runs.readable_runs. Runs begin as far apart as the longest could be."""
    (groups, num, width), device = pages.shape, pages.device
    pages = pages.view(torch.uint8) if pages.stride(-1) == 1 else pages.contiguous().view(torch.uint8)
    most = 0 if tokens is None else tokens.shape[-1]
    given = pages if tokens is None else tokens.contiguous()
    sizes = [
        (groups, num),
        (groups, num),
        (groups * num * width,),
        (groups, num),
        (groups, num),
        (groups * num * most,),
    ]
    made = [torch.empty(size, dtype=torch.int32, device=device) for size in (sizes if most else sizes[:3])]
    if pages.numel():
        _list_runs[(groups * num,)](
            pages, given, kv.table, kv.sink, kv.window, blocks.seq, blocks.pos, blocks.count,
            *made, *made[: 6 - len(made)],
            *pages.stride()[:2], kv.table.stride(0), kv.sink.stride(0), num, width, most, blocks.size,
            PAGE=kv.page_size, TOKENS=most > 0, **along_row(max(width, most), COLUMNS),
            enable_fp_fusion=True,  # said aloud, because Triton's default is about to change; nothing here is a float
        )  # fmt: skip
    return SparseIndex(*made)


@triton.jit(do_not_specialize=(*VARYING, "most"))
def _list_runs(
    pages_ptr, tokens_ptr, table_ptr, sink_ptr, window_ptr, seq_ptr, pos_ptr, count_ptr,
    start_ptr, found_ptr, list_ptr, token_start_ptr, token_found_ptr, token_list_ptr,
    pages_g, pages_n, table_b, rule_b, num, width, most, size,
    PAGE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    g, n = row // num, row % num
    seq, pos = tl.load(seq_ptr + n), tl.load(pos_ptr + n)
    first, last = pos // size * size // PAGE, pos + tl.load(count_ptr + n) - 1
    sink, oldest = tl.load(sink_ptr + seq * rule_b + g), pos - tl.load(window_ptr + seq * rule_b + g) + 1
    pages_ptr += g.to(tl.int64) * pages_g + n.to(tl.int64) * pages_n
    table_ptr += seq.to(tl.int64) * table_b

    written = 0
    to = list_ptr + row.to(tl.int64) * width
    for begin in range(0, (last + PAGE) // PAGE, COLUMNS):
        page = begin + tl.arange(0, COLUMNS)
        there = (page * PAGE <= last) & (page < width)
        kept = _wanted(pages_ptr, page, there, first, sink, oldest, PAGE)
        kept = kept & (tl.load(table_ptr + page, mask=there, other=NULL_PAGE) != NULL_PAGE)
        place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(to + place, page, mask=kept)
        written += tl.sum(kept.to(tl.int32), 0)
    tl.store(start_ptr + row, row * width)
    tl.store(found_ptr + row, written)
    if TOKENS:
        written, largest = 0, -1
        tokens_ptr += row.to(tl.int64) * most
        to = token_list_ptr + row.to(tl.int64) * most
        for begin in range(0, most, COLUMNS):
            at = begin + tl.arange(0, COLUMNS)
            token = tl.load(tokens_ptr + at, mask=at < most, other=-1)
            before = tl.load(tokens_ptr + at - 1, mask=(at > begin) & (at < most), other=-1)
            before = tl.maximum(tl.associative_scan(before, 0, _larger), largest)
            there = (token > before) & (token <= last)
            page = tl.where(there, token // PAGE, 0)
            there = there & (tl.load(table_ptr + page, mask=there, other=NULL_PAGE) != NULL_PAGE)
            covered = _wanted(pages_ptr, page, there, first, sink, oldest, PAGE)
            kept = there & ((token < sink) | (token >= oldest)) & (covered == 0)
            place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(to + place, token, mask=kept)
            written += tl.sum(kept.to(tl.int32), 0)
            largest = tl.maximum(largest, tl.max(token, 0))
        tl.store(token_start_ptr + row, row * most)
        tl.store(token_found_ptr + row, written)


@triton.jit
def _wanted(pages_ptr, page, there, first, sink, oldest, PAGE: tl.constexpr):
    """Whether a page that is `there` was chosen or is needed, and some query may see it."""
    chosen = tl.load(pages_ptr + page, mask=there, other=0) != 0
    visible = (page * PAGE < sink) | ((page + 1) * PAGE > oldest)
    return there & (chosen | (page >= first) | (page == 0)) & visible


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)
