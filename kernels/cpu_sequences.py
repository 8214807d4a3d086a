"""What ops share that go through whole sequences, one head after the other. For the CPU."""

import torch
from torch import Tensor

from gossamer.kernels.cpu_pages import Pool
from gossamer.kernels.layout import NULL_PAGE, PagedKV, QueryBlocks


def by_sequence(blocks: QueryBlocks) -> dict[int, Tensor]:
    """Sequence -> the numbers of its blocks."""
    found: dict[int, list[int]] = {}
    for n, row in enumerate(blocks.rows):
        found.setdefault(row.seq, []).append(n)
    return {seq: torch.tensor(own) for seq, own in found.items()}


def queries_of(blocks: QueryBlocks, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """own [n] block numbers -> for each of their queries its block's place in `own`, its token and its place among
    its block's queries, all [M]."""
    count = blocks.count[own].long()
    place = torch.arange(own.numel()).repeat_interleave(count)
    within = torch.arange(place.numel()) - (count.cumsum(0) - count)[place]
    return place, blocks.token[own].long()[place] + within, within


def resident_pages(kv: PagedKV, seq: int, stop: int) -> Tensor:
    """The logical pages before `stop` that were not released, ascending."""
    return (kv.table[seq, :stop] != NULL_PAGE).nonzero().flatten()


def read_head(pool: Pool, head: int, physical: Tensor) -> Tensor:
    """physical [n > 0] -> those pages of one head, [n, S, D] float32: in place where they lie side by side and are
    float32 already."""
    if bool((physical[1:] - physical[:-1] == 1).all()):
        where = slice(int(physical[0]), int(physical[0]) + physical.numel())
        stored, scale = pool.bytes[head, where], None if pool.scale is None else pool.scale[head, where]
    else:
        stored = pool.bytes[head].index_select(0, physical)
        scale = None if pool.scale is None else pool.scale[head].index_select(0, physical)
    return stored.float() if scale is None else pool.widened(stored, scale)
