"""Inputs for the ops that score past pages and tokens, and what must come out: in float64, one query of one head after
the other, straight from the definition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from kernel_cases import NAN, make_case
from torch import Tensor

from gossamer.kernels.layout import NULL_PAGE, PAGE_SIZE, PagedKV, QueryBlocks

SCALE = 0.3
SPANS = ((100, 60), (0, 33), (230, 3), (128, 64))  # chunks that start and end inside a tile, and one without a past
RELEASING = ((64, 70), (0, 90))  # sinks and windows with which pages in the middle are released


@dataclass(frozen=True)
class MassCase:
    q: Tensor  # [T, H, D], NaN where no block or head of the view has a query
    kv: PagedKV
    blocks: QueryBlocks
    full: Tensor  # [F]: the physical pages that have summaries

    def table(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
        """[G, P, *shape], random for the pages in `full`, NaN for all others."""
        table = torch.full((*self.kv.k.shape[:2], *shape), NAN, dtype=dtype or self.q.dtype)
        some = torch.randn(table.shape[0], self.full.numel(), *shape, generator=torch.Generator().manual_seed(seed))
        table[:, self.full] = some.to(table.dtype)
        return table

    def bounds(self, stretches: int, dtype: torch.dtype | None = None) -> Tensor:
        """[G, P, stretches, 2, D]: minimum, maximum."""
        return self.table(stretches, 2, self.q.shape[2], dtype=dtype).sort(3).values

    def cuda(self) -> tuple[Tensor, PagedKV, QueryBlocks]:
        kv = self.kv
        tensors = (kv.k, kv.v, kv.table, kv.length, kv.heads, kv.sink, kv.window)
        return (
            self.q.cuda(),
            PagedKV(*(x.cuda() for x in tensors), kv.ratio),
            QueryBlocks.of(self.blocks.size, self.blocks.rows, "cuda"),
        )


def make_mass_case(
    spans: Sequence[tuple[int, int]] = SPANS,
    *,
    tile: int = 32,  # 1: decode, every sequence has one new token
    ratio: int = 2,
    heads: Sequence[int] = (2, 0),
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    released: bool = False,
    seed: int = 0,
) -> MassCase:
    spans = [(past, 1 if tile == 1 else new) for past, new in spans]
    windows = RELEASING if released else ()
    case = make_case(spans, tile=tile, ratio=ratio, heads=heads, dim=dim, dtype=dtype, windows=windows, seed=seed)
    assert released == bool((case.kv.table[2, :3] == NULL_PAGE).any())
    q = torch.full_like(case.q, NAN)
    for row in case.blocks.rows:
        for head in heads:
            own = slice(row.token, row.token + row.count), slice(head * ratio, (head + 1) * ratio)
            q[own] = case.q[own]
    full = [
        int(case.kv.table[b, page])
        for b, (past, new) in enumerate(spans)
        for page in range((past + new) // PAGE_SIZE)
        if case.kv.table[b, page] != NULL_PAGE
    ]
    return MassCase(q, case.kv, case.blocks, torch.tensor(full))


Logits = Callable[[int, Tensor, int], Tensor]  # g, query [D] float64, physical page -> [columns of the page] float64


def reference_mass(case: MassCase, per_page: int, logits: Logits) -> Tensor:
    """[G, N, L * per_page] float64."""
    kv, blocks = case.kv, case.blocks
    mass = torch.zeros(kv.heads.numel(), len(blocks), kv.table.shape[1] * per_page, dtype=torch.float64)
    for n, row in enumerate(blocks.rows):
        origin = row.pos // blocks.size * blocks.size
        past = [page for page in range(origin // PAGE_SIZE) if kv.table[row.seq, page] != NULL_PAGE]
        for g, head in enumerate(kv.heads.tolist() if past else ()):
            largest = torch.zeros(len(past) * per_page, dtype=torch.float64)
            for j in range(kv.ratio):
                mean = torch.zeros_like(largest)
                for i in range(row.count):
                    query = case.q[row.token + i, head * kv.ratio + j].double()
                    scores = torch.cat([logits(g, query, int(kv.table[row.seq, page])) for page in past])
                    mean += scores.softmax(0) / row.count
                largest = largest.maximum(mean)
            largest /= largest.sum()
            for k, page in enumerate(past):
                mass[g, n, page * per_page : (page + 1) * per_page] = largest[k * per_page : (k + 1) * per_page]
    return mass


def page_logits(keys: Tensor) -> Logits:
    """keys [G, P, d]."""
    return lambda g, query, page: (SCALE * torch.dot(query, keys[g, page].double())).reshape(1)


def bound_logits(bounds: Tensor) -> Logits:
    """bounds [G, P, c, 2, D]."""

    def of_page(g: int, query: Tensor, page: int) -> Tensor:
        stretches = [torch.maximum(query * low, query * high).sum() for low, high in bounds[g, page].double()]
        return (SCALE * torch.stack(stretches).max()).reshape(1)

    return of_page


def label_logits(labels: Tensor, channels: Tensor) -> Logits:
    """labels [G, P, S, r], channels [G, r]."""

    def of_page(g: int, query: Tensor, page: int) -> Tensor:
        total = torch.zeros(labels.shape[2], dtype=torch.float64)
        for j, channel in enumerate(channels[g].tolist()):
            if channel >= 0:
                total += query[channel] * labels[g, page, :, j].double()
        return SCALE * total

    return of_page


def check_mass(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found.double().cpu(), expected, atol=tolerance, rtol=tolerance)
    assert ((found > 0).cpu() <= (expected > 0)).all(), "something that is not past has mass"
