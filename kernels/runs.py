"""From the pages and tokens that selectors want read to an index that a kernel may trust, and can follow.

The safety rules live here and nowhere else.
"""

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels.layout import NULL_PAGE, Array, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.native import compiles


def readable_runs(pages: Tensor, tokens: Tensor | None, kv: PagedKV, blocks: QueryBlocks) -> SparseIndex:
    """pages [G, N, L] bool, tokens [G, N, K] int32 positions, ascending, -1 as padding -> what to read.

    Added: the first page and the pages from the tile's origin to its last query. Removed: pages in the future,
    pages that were released, and pages that no query of the tile may see through the head's window; tokens likewise,
    those that a selected page covers, and those that are no larger than one before them. Nothing is read back from a
    device.
    """
    if pages.is_cuda:
        from gossamer.kernels.triton.runs import launch

        return launch(pages, tokens, kv, blocks)
    if compiles():
        from gossamer.kernels.native.runs import launch as launch_on_cpu

        return launch_on_cpu(pages, tokens, kv, blocks)
    return readable_runs_torch(pages, tokens, kv, blocks)


def readable_runs_torch(pages: Tensor, tokens: Tensor | None, kv: PagedKV, blocks: QueryBlocks) -> SparseIndex:
    """What readable_runs means."""
    size, seq, pos = kv.page_size, blocks.seq.numpy(), blocks.pos.numpy()
    page = np.arange(kv.table.shape[1], dtype=np.int32)  # [L]
    last = (pos + blocks.count.numpy() - 1)[:, None]  # [N, 1]
    first = pos // blocks.size * blocks.size // size
    needed = (page >= first[:, None]) | (page == 0)
    readable = (page * size <= last) & (kv.table.numpy()[seq] != NULL_PAGE)  # [N, L]
    # [G, N, 1]: the first position in the first query's window
    oldest = (pos[:, None] - kv.window.numpy()[seq]).T[..., None] + 1
    sink = kv.sink.numpy()[seq].T[..., None]
    if (oldest > 0).any():
        readable = readable & ((page * size < sink) | ((page + 1) * size > oldest))  # [G, N, L]
    wanted = (pages.numpy() | needed) & readable
    listed = list_pages(torch.from_numpy(wanted))
    if tokens is None or tokens.shape[-1] == 0:
        return SparseIndex(*listed)
    return SparseIndex(*listed, *list_tokens(_readable_tokens(tokens.numpy(), wanted, kv, blocks, sink, oldest, last)))


def _readable_tokens(
    tokens: Array, pages: Array, kv: PagedKV, blocks: QueryBlocks, sink: Array, oldest: Array, last: Array
) -> Tensor:
    """tokens [G, N, K] -> the same with every token that may not or need not be read replaced by -1."""
    kept = (tokens >= 0) & (tokens <= last) & ((tokens < sink) | (tokens >= oldest))
    kept[..., 1:] &= tokens[..., 1:] > np.maximum.accumulate(tokens, -1)[..., :-1]
    elsewhere = (kv.table.numpy()[blocks.seq.numpy()] != NULL_PAGE) & ~pages
    rows = np.arange(kept.shape[0] * kept.shape[1]).reshape(*kept.shape[:2], 1) * pages.shape[-1]
    kept &= elsewhere.take(rows + tokens // kv.page_size, mode="clip")  # whatever it finds for what is not kept
    return torch.from_numpy(np.where(kept, tokens, np.int32(-1)))


def list_pages(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mask [G, N, L] bool -> start [G, N], count [G, N], pages [G * N * L], all int32, on a CPU.

    The run of (g, n) is pages[start : start + count]: the numbers of the set columns, ascending. Entries of `pages`
    behind the last run mean nothing.
    """
    kept = mask.numpy()
    return _listed(kept, np.flatnonzero(kept) % max(1, kept.shape[-1]))


def list_tokens(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [G, N, K] int32 positions, -1 anywhere as padding -> start [G, N], count [G, N], tokens [G * N * K], all
    int32, as in `list_pages`."""
    values = tokens.numpy()
    kept = values >= 0
    return _listed(kept, values[kept])


def _listed(kept: Array, values: Array) -> tuple[Tensor, Tensor, Tensor]:
    count = kept.sum(-1, dtype=np.int32)
    start = (np.cumsum(count, dtype=np.int32) - count.ravel()).reshape(count.shape)
    listed = np.zeros(kept.size, dtype=np.int32)
    listed[: len(values)] = values
    return torch.from_numpy(start), torch.from_numpy(count), torch.from_numpy(listed)
