"""kernels/runs.py, compiled for the CPU: a thread takes one tile of one head after another."""

import functools

import numpy as np
import torch
from numba import carray
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.native.team import Body, bytes_at, compiled, int32_at, job, run, take

JOB = np.dtype([(name, "i8") for name in (
    "next", "items", "blocks", "groups", "wanted", "width", "tokens", "most", "seq", "pos", "query_count", "size",
    "table", "table_row", "sink", "window", "rule_row", "page_size", "start", "count", "pages", "token_start",
    "token_count", "kept",
)])  # fmt: skip


def launch(pages: Tensor, tokens: Tensor | None, kv: PagedKV, blocks: QueryBlocks) -> SparseIndex:
    assert kv.sink.stride() == kv.window.stride()
    shape, width, most = pages.shape[:2], pages.shape[2], 0 if tokens is None else tokens.shape[2]
    taken, pages = torch.zeros(1, dtype=torch.int64), pages.contiguous()
    start, count, token_start, token_count = torch.empty(4, *shape, dtype=torch.int32).unbind()
    listed = torch.empty(shape.numel() * width, dtype=torch.int32)
    kept = torch.empty(shape.numel() * most, dtype=torch.int32)
    tokens = None if tokens is None or most == 0 else tokens.contiguous()
    work = job(
        JOB, next=taken, items=shape.numel(), blocks=len(blocks), groups=len(kv.heads), wanted=pages, width=width,
        tokens=tokens, most=most, seq=blocks.seq, pos=blocks.pos, query_count=blocks.count, size=blocks.size,
        table=kv.table, table_row=kv.table.stride(0), sink=kv.sink, window=kv.window, rule_row=kv.sink.stride(0),
        page_size=kv.page_size, start=start, count=count, pages=listed, token_start=token_start,
        token_count=token_count, kept=kept,
    )  # fmt: skip
    run(list_runs(), work)
    if tokens is None:
        return SparseIndex(start, count, listed)
    return SparseIndex(start, count, listed, token_start, token_count, kept)


@functools.cache
def list_runs() -> Body:
    def body(address):
        work = carray(address, 1)[0]
        while True:
            item = take(work.next)
            if item >= work.items:
                return
            n, g, size = item % work.blocks, item // work.blocks, work.page_size
            seq, pos = carray(int32_at(work.seq), work.blocks)[n], carray(int32_at(work.pos), work.blocks)[n]
            table = carray(int32_at(work.table + 4 * work.table_row * seq), work.width)
            sink = carray(int32_at(work.sink + 4 * work.rule_row * seq), work.groups)[g]
            oldest = pos + 1 - np.int64(carray(int32_at(work.window + 4 * work.rule_row * seq), work.groups)[g])
            last = np.int64(pos) + carray(int32_at(work.query_count), work.blocks)[n] - 1
            first = np.int64(pos) // work.size * work.size // size
            wanted = carray(bytes_at(work.wanted + item * work.width), work.width)
            pages = carray(int32_at(work.pages + 4 * item * work.width), work.width)
            count = 0
            for page in range(min(work.width, last // size + 1)):
                seen = page * size < sink or (page + 1) * size > oldest
                pages[count] = page
                count += (wanted[page] != 0 or page >= first or page == 0) and seen and table[page] >= 0
            carray(int32_at(work.start), work.items)[item] = item * work.width
            carray(int32_at(work.count), work.items)[item] = count
            if work.tokens == 0:
                continue
            tokens = carray(int32_at(work.tokens + 4 * item * work.most), work.most)
            kept = carray(int32_at(work.kept + 4 * item * work.most), work.most)
            listed, before, next_page = 0, np.int64(-1), 0
            for i in range(work.most):
                token = np.int64(tokens[i])
                if token <= before:
                    continue
                before, page = token, token // size
                while next_page < count and pages[next_page] < page:
                    next_page += 1
                covered = next_page < count and pages[next_page] == page
                if token <= last and (token < sink or token >= oldest) and table[page] >= 0 and not covered:
                    kept[listed] = token
                    listed += 1
            carray(int32_at(work.token_start), work.items)[item] = item * work.most
            carray(int32_at(work.token_count), work.items)[item] = listed

    return compiled(JOB, body)
