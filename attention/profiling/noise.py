"""A layer of noise to time attention on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gossamer.attention.index import build_index
from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.reading import Shape
from gossamer.attention.selectors import Selector
from gossamer.attention.selectors.base import CORRECTION
from gossamer.attention.step import TILE_ROWS
from gossamer.kernels.dropped_pages import add_dropped_pages
from gossamer.kernels.layout import PAGE_SIZE, UNLIMITED, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.runs import list_pages
from gossamer.kvcache.summaries import FilledPages, Summary

BATCHES = (1, 4)  # sequences that decode: few and many, to tell what a call costs from what its blocks add
FEWER = 4  # times as few tokens of a prompt, for the same reason


@dataclass(frozen=True, slots=True)
class Layer:
    """Keys, values and queries of noise: a chunk at the end of a prompt, or the newest token of some sequences."""

    kv: PagedKV
    q: Tensor
    blocks: QueryBlocks
    scale: float

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def shares(self) -> int:
        """Blocks times KV heads, over which a time is shared out."""
        return len(self.blocks) * self.kv.heads.numel()


def noise_layers(
    shape: Shape, phase: Phase, length: int, chunk: int, summaries: Sequence[Summary]
) -> tuple[Layer, Layer]:
    """With few blocks and with many, over the same keys of sequences of `length` tokens. chunk: tokens of a prompt that
    are computed at once."""
    sequences = 1 if phase == "prefill" else BATCHES[-1]
    pages, heads, device = length // PAGE_SIZE, shape.kv_heads, shape.device
    pool = (heads, sequences * pages, PAGE_SIZE, shape.head_dim)
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)

    table = torch.arange(sequences * pages, dtype=torch.int32, device=device).view(sequences, pages)
    sink = torch.zeros(sequences, heads, dtype=torch.int32, device=device)
    kv = PagedKV(
        noise(*pool),
        noise(*pool),
        table,
        torch.full((sequences,), length, dtype=torch.int32, device=device),
        torch.arange(heads, dtype=torch.int32, device=device),
        sink,
        torch.full_like(sink, UNLIMITED),
        shape.ratio,
        {
            each.name: torch.zeros(*pool[:2], *each.shape(PAGE_SIZE, shape.head_dim), device=device, dtype=shape.dtype)
            for each in summaries
        },
    )
    filled = FilledPages.of([(n, page) for n in range(sequences) for page in range(pages)], device)
    for each in dict.fromkeys(summaries):
        each.write(kv, filled)
    least = min(chunk, length) // FEWER
    few, many = (_blocks(shape, phase, length, new, batch) for new, batch in zip((least, chunk), BATCHES, strict=True))

    def layer(blocks: QueryBlocks) -> Layer:
        tokens = sum(row.count for row in blocks.rows)
        return Layer(kv, noise(tokens, shape.query_heads, shape.head_dim), blocks, shape.head_dim**-0.5)

    return layer(few), layer(many)


def _blocks(shape: Shape, phase: Phase, length: int, new: int, batch: int) -> QueryBlocks:
    """Of `new` tokens at the end of a prompt, or the newest ones of `batch` sequences."""
    if phase == "decode":
        return QueryBlocks.of(1, [BlockRow(n, n, length - 1, 1) for n in range(batch)], shape.device)
    size, first = max(1, TILE_ROWS // shape.ratio), max(0, length - new)
    rows = [BlockRow(0, at - first, at, min(size, length - at)) for at in range(first, length, size)]
    return QueryBlocks.of(size, rows, shape.device)


def choosing(layer: Layer, selector: Selector) -> Callable[[], None]:
    """From the queries to the index, and the correction for dropped pages where there is one."""
    q, kv, blocks = layer.q, layer.kv, layer.blocks
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2], device=q.device)

    def choose() -> None:
        index = build_index(selector.propose(q, kv, blocks, layer.scale), kv, blocks)
        if selector.corrects:
            means = (kv.summaries[each.name] for each in CORRECTION)
            add_dropped_pages(q, kv, blocks, index, out, lse, *means, scale=layer.scale)

    return choose


def attending(layer: Layer, read: int, tokens: int = 0) -> Callable[[], None]:
    """So many pages for every block, or all that it may see, and so many single tokens."""
    index = _index(layer, read, tokens)
    out = torch.empty_like(layer.q)
    lse = torch.empty(layer.q.shape[:2], dtype=torch.float32, device=layer.device)
    attend = paged_decode if layer.blocks.size == 1 else paged_prefill
    return partial(attend, layer.q, layer.kv, layer.blocks, index, out, lse, scale=layer.scale)


def _index(layer: Layer, pages: int, tokens: int) -> SparseIndex:
    """So many pages for every block, its own the last of them; tokens anywhere in the pages before."""
    heads, blocks, width = layer.kv.heads.numel(), len(layer.blocks), layer.kv.table.shape[1]
    generator = torch.Generator().manual_seed(1)
    own = (layer.blocks.pos.cpu() // PAGE_SIZE).tolist()
    mask = torch.zeros(heads, blocks, width, dtype=torch.bool)
    for n, last in enumerate(own):
        mask[:, n, last] = True
        for g in range(heads):
            mask[g, n, torch.randperm(max(1, last), generator=generator)[: pages - 1]] = True
    index = SparseIndex(*(each.to(layer.device) for each in list_pages(mask)))
    if not tokens:
        return index
    some = torch.randperm(max(1, min(own)) * PAGE_SIZE, generator=generator)[:tokens].sort().values.int()
    flat = some.repeat(heads * blocks).to(layer.device)
    count = torch.full((heads, blocks), len(some), dtype=torch.int32, device=layer.device)
    start = (torch.arange(heads * blocks, dtype=torch.int32, device=layer.device) * len(some)).view(heads, blocks)
    return SparseIndex(index.start, index.count, index.pages, start, count, flat)
