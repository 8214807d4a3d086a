"""XAttention's estimate of how much of a query block's softmax each page holds: sums along antidiagonals."""

import torch
from torch import Tensor

from gossamer.kernels.cpu_pages import Pool, pools
from gossamer.kernels.cpu_sequences import by_sequence, queries_of, read_head, resident_pages
from gossamer.kernels.layout import PagedKV, QueryBlocks


def antidiagonal_mass(q: Tensor, kv: PagedKV, blocks: QueryBlocks, stride: int, *, scale: float) -> Tensor:
    """q [T, H, D] (any strides, unit in D) -> [G, N, L] float32: the mass of each past page of each block.

    Past pages of block n: the logical pages before the one that holds blocks.origin[n], the released ones left out.
    The queries of a block form groups of `stride` positions counted from its origin, the keys of a page groups of
    `stride` (which divides the page size). In a pair of groups the query at offset c meets the key at offset
    stride - 1 - c; the pair's logit is scale / stride times the sum of these products, over the queries that the block
    really has. Then a softmax over the key groups of all past pages, summed page by page; the mean over the block's
    query groups; the maximum over the query heads of the KV head; divided by its sum over the pages. 0 for pages that
    are not past, so all 0 for a block without past pages.
    """
    assert kv.page_size % stride == 0, "the stride has to divide the page size"
    if q.is_cuda and len(blocks):
        from gossamer.kernels.triton.antidiagonal import launch

        return launch(q, kv, blocks, stride, scale=scale)
    return antidiagonal_mass_torch(q, kv, blocks, stride, scale=scale)


BATCHED = 1 << 22  # numbers held at once for a batch of tiles: their queries, and their logits of pages
READ = 1 << 22  # numbers of keys held at once
WRITTEN = 1 << 20  # logits of key groups held at once: less than that much is computed for pages that are not past


def antidiagonal_mass_torch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, stride: int, *, scale: float) -> Tensor:
    """What antidiagonal_mass means; also how the CPU runs it: products of whole groups, as one long vector each."""
    mass = torch.zeros(kv.heads.numel(), len(blocks), kv.table.shape[1], device=q.device)
    rows, (keys, _) = -(-blocks.size // stride) * kv.ratio, pools(kv, torch.float32)
    for seq, own in by_sequence(blocks).items():
        past = blocks.origin[own] // kv.page_size
        pages = resident_pages(kv, seq, int(past.max()))
        if pages.numel() == 0:
            continue
        most = max(1, BATCHED // (rows * max(pages.numel(), stride * q.shape[2])))
        for some in own.split(most):
            readable = torch.searchsorted(pages, blocks.origin[some] // kv.page_size)  # how many pages are past
            real = _real_groups(blocks, some, stride)
            for g, head in enumerate(kv.heads.tolist()):
                heads = slice(head * kv.ratio, (head + 1) * kv.ratio)
                packed = _pack(q[:, heads], blocks, some, stride).mul_(scale / stride)
                logits = _page_logits(packed, keys, g, kv.table[seq, pages], readable)
                mass[g, some[:, None], pages] = _mass(logits.unflatten(1, (-1, kv.ratio)), real, readable)
    return mass


def _real_groups(blocks: QueryBlocks, own: Tensor, stride: int) -> Tensor:
    """[n, query groups of a tile] bool: which of them hold a query."""
    begin = (blocks.pos - blocks.origin)[own, None]
    first = torch.arange(0, blocks.size, stride)
    return (first < begin + blocks.count[own, None]) & (first + stride > begin)


def _pack(q: Tensor, blocks: QueryBlocks, own: Tensor, stride: int) -> Tensor:
    """q [T, R, D] -> [n, query groups * R, stride * D] float32: each group's queries, the last one first; 0 where the
    block has no query."""
    place, token, within = queries_of(blocks, own)
    offset = (blocks.pos - blocks.origin)[own].long()[place] + within
    packed = torch.zeros(own.numel(), -(-blocks.size // stride), q.shape[1], stride, q.shape[2])
    packed[place, offset // stride, :, stride - 1 - offset % stride] = q[token].float()
    return packed.flatten(3).flatten(1, 2)


def _page_logits(packed: Tensor, pool: Pool, head: int, physical: Tensor, readable: Tensor) -> Tensor:
    """packed [n, R, stride * D], physical [X] pages of which block i reads the first readable[i] -> [n, R, X]: the
    logarithm of the sum of exponentials over each page's key groups, -inf where not readable."""
    tiles, rows, long = packed.shape
    pages, page = physical.numel(), pool.stored.shape[2] * pool.stored.shape[3]
    logits = torch.full((tiles, rows, pages), -torch.inf)
    read = max(1, READ // page)
    for low in range(0, pages, read):
        keys = read_head(pool, head, physical[low : low + read]).reshape(-1, page // long, long).permute(1, 2, 0)
        step = max(1, WRITTEN // (rows * keys.shape[0] * keys.shape[2]))
        for begin in range(0, tiles, step):
            some = slice(begin, min(begin + step, tiles))
            high = min(int(readable[some].max()), low + keys.shape[2])
            if high > low:
                queries = packed[some].flatten(0, 1).expand(keys.shape[0], -1, -1)
                scores = torch.bmm(queries, keys[..., : high - low])  # [key groups of a page, rows, pages]
                logits[some, :, low:high] = scores.logsumexp(0).unflatten(0, (-1, rows))
    return logits.masked_fill_((torch.arange(pages) >= readable[:, None])[:, None], -torch.inf)


def _mass(logits: Tensor, real: Tensor, readable: Tensor) -> Tensor:
    """logits [n, query groups, heads, X], real [n, query groups], readable [n] -> [n, X]."""
    share = real / real.sum(1, keepdim=True)
    held = torch.einsum("nghx,ng->nhx", logits.softmax(-1), share).amax(1)
    return (held / held.sum(-1, keepdim=True)).masked_fill_((readable == 0)[:, None], 0.0)
