"""From a selector's proposal to an index a kernel may trust. The safety rules live here and nowhere else."""

import torch
from torch import Tensor

from gossamer.attention.selectors.base import Proposal
from gossamer.kernels.compact import compact, compact_tokens
from gossamer.kernels.layout import NULL_PAGE, PagedKV, QueryBlocks, SparseIndex


def build_index(proposal: Proposal, kv: PagedKV, blocks: QueryBlocks) -> SparseIndex:
    """proposal.pages [G, N, L] bool, proposal.tokens [G, N, K] int32 or None -> what the kernels read.

    Added: the first page and the pages from the tile's origin to its last query. Removed: pages in the future,
    pages that were released, and pages that no query of the tile may see through the head's window; tokens likewise,
    and those that a selected page covers.
    """
    size, seq = kv.page_size, blocks.seq.long()
    page = torch.arange(kv.table.shape[1], device=kv.table.device)  # [L]
    last = (blocks.pos + blocks.count - 1)[:, None]  # [N, 1]
    own = page >= (blocks.origin // size)[:, None]
    wanted = proposal.pages | own | (page == 0)
    readable = (page * size <= last) & (kv.table[seq] != NULL_PAGE)  # [N, L]
    sink = kv.sink[seq].T[..., None]  # [G, N, 1]
    # [G, N, 1]: the first position in the first query's window
    oldest = (blocks.pos[:, None] - kv.window[seq]).T[..., None] + 1
    visible = (page * size < sink) | ((page + 1) * size > oldest)  # [G, N, L]
    pages = wanted & readable & visible
    start, count, flat = compact(pages)
    if proposal.tokens is None:
        return SparseIndex(start, count, flat)
    kept = _readable_tokens(proposal.tokens, pages, readable, sink, oldest, last, size)
    return SparseIndex(start, count, flat, *compact_tokens(kept))


def _readable_tokens(
    tokens: Tensor, pages: Tensor, readable: Tensor, sink: Tensor, oldest: Tensor, last: Tensor, size: int
) -> Tensor:
    """tokens [G, N, K] -> the same, ascending, with every token that may not or need not be read replaced by -1."""
    tokens = tokens.sort(-1).values
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    repeated[..., 1:] = tokens[..., 1:] == tokens[..., :-1]
    home = (tokens // size).clamp(0, pages.shape[-1] - 1).long()
    covered = pages.gather(-1, home)
    resident = readable.expand_as(pages).gather(-1, home)
    visible = (tokens < sink) | (tokens >= oldest)
    keep = (tokens >= 0) & (tokens <= last) & resident & visible & ~covered & ~repeated
    return torch.where(keep, tokens, -1)
