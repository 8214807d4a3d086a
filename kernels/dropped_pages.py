"""FlashPrefill's correction: pages that were not read still count, as if all of their keys were the mean key."""

import math

import torch
from torch import Tensor

from gossamer.kernels.cpu_gathered import ragged_rows
from gossamer.kernels.cpu_sequences import by_sequence, queries_of
from gossamer.kernels.layout import NULL_PAGE, PagedKV, QueryBlocks, SparseIndex


def add_dropped_pages(
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
    """Merge into out [T, H, D] and lse [T, H], as the attention kernel left them, what `index` left out.

    Dropped pages of (g, n): the past pages (before the one that holds the tile's origin, not released) that are not in
    its run and that every query of the tile may see whole. Each is one more key mean_k[g, page] with the value
    mean_v[g, page] ([G, P, D], means over the page) and the logit cap(scale * q . mean_k) + log(S). Single tokens of
    the index are not looked at: a page they belong to counts as a whole. Rows without a dropped page keep every bit.
    """
    if len(blocks) == 0:
        return
    if q.is_cuda:
        from gossamer.kernels.triton.dropped_pages import launch

        return launch(q, kv, blocks, index, out, lse, mean_k, mean_v, scale=scale, softcap=softcap)
    add_dropped_pages_torch(q, kv, blocks, index, out, lse, mean_k, mean_v, scale=scale, softcap=softcap)


WRITTEN = 1 << 20  # logits held at once


def add_dropped_pages_torch(
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
    """What add_dropped_pages means; also how the CPU runs it: many tiles of one sequence at a time."""
    dropped = _dropped_pages(kv, blocks, index)
    for seq, own in by_sequence(blocks).items():
        for g, head in enumerate(kv.heads.tolist()):
            heads = slice(head * kv.ratio, (head + 1) * kv.ratio)
            lacking = own[dropped[g, own].any(1)]
            most = max(1, WRITTEN // (blocks.size * kv.ratio * dropped.shape[2]))
            for some in lacking.split(most) if lacking.numel() else ():
                pages = dropped[g, some].any(0).nonzero().flatten()
                physical = kv.table[seq, pages]
                k, v = (mean[g].index_select(0, physical).float() for mean in (mean_k, mean_v))
                place, token, _ = queries_of(blocks, some)
                logits = (q[token, heads].float() * scale) @ k.T  # [M, heads, pages]
                if softcap > 0:
                    logits.div_(softcap).tanh_().mul_(softcap)
                logits.masked_fill_(~dropped[g, some[:, None], pages][place][:, None], -torch.inf)
                added = logits.logsumexp(-1) + math.log(kv.page_size)
                value = logits.softmax(-1) @ v
                before = lse[token, heads]
                total = torch.logaddexp(before, added)
                kept = out[token, heads].float() * (before - total).exp()[..., None]
                out[token, heads] = (kept + value * (added - total).exp()[..., None]).to(out.dtype)
                lse[token, heads] = total


def _dropped_pages(kv: PagedKV, blocks: QueryBlocks, index: SparseIndex) -> Tensor:
    """[G, N, L] bool."""
    size, seq = kv.page_size, blocks.seq.long()
    groups, tiles = index.count.shape
    read = torch.zeros(groups * tiles, kv.table.shape[1], dtype=torch.bool)
    row, at = ragged_rows(index.start.flatten(), index.count.flatten())
    read[row, index.pages[at].long()] = True
    page = torch.arange(kv.table.shape[1])
    past = (page < (blocks.origin // size)[:, None]) & (kv.table[seq] != NULL_PAGE)  # [N, L]
    sink = kv.sink[seq].T[..., None]  # [G, N, 1]
    newest = (blocks.pos + blocks.count - 1)[:, None]
    unseen = newest - kv.window[seq].T[..., None]  # [G, N, 1]: the last position behind some query's window
    whole = (torch.maximum(page * size, sink) > unseen) | ((page + 1) * size <= sink)
    return past & whole & ~read.view(groups, tiles, -1)
