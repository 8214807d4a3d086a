"""Inputs for the attention kernels, and what must come out: computed in float64, straight from the definition."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.fp8 import FP8, SCALE, quantise
from gossamer.kernels.layout import NULL_PAGE, PAGE_SIZE, UNLIMITED, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.runs import list_pages, list_tokens

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One call of a kernel. `selected[g][n]` is the set of positions in the run of (g, n)."""

    q: Tensor  # [T, H, D]
    kv: PagedKV
    blocks: QueryBlocks
    index: SparseIndex
    keys: list[Tensor]  # per sequence [length, G, D] float64, as stored
    values: list[Tensor]
    selected: list[list[Tensor]]
    scale: float

    def blank(self) -> tuple[Tensor, Tensor]:
        """out and lse, full of NaN."""
        return torch.full_like(self.q, NAN), torch.full(self.q.shape[:2], NAN, device=self.q.device)

    def only(self, n: int) -> tuple[QueryBlocks, SparseIndex]:
        """Query block n alone."""
        i, runs = self.index, slice(n, n + 1)
        singles = () if i.token_start is None else (i.token_start[:, runs], i.token_count[:, runs], i.tokens)  # type: ignore[index]
        blocks = QueryBlocks.of(self.blocks.size, [self.blocks.rows[n]], self.q.device)
        return blocks, SparseIndex(i.start[:, runs], i.count[:, runs], i.pages, *singles)

    def to(self, device: str) -> "Case":
        kv = PagedKV(
            *(x.to(device) for x in (self.kv.k, self.kv.v, self.kv.table, self.kv.length)),
            *(x.to(device) for x in (self.kv.heads, self.kv.sink, self.kv.window)),
            self.kv.ratio,
            scale=None if self.kv.scale is None else self.kv.scale.to(device),
        )
        blocks = QueryBlocks.of(self.blocks.size, self.blocks.rows, device)
        i = self.index
        tensors = (i.start, i.count, i.pages, i.token_start, i.token_count, i.tokens)
        index = SparseIndex(*(None if x is None else x.to(device) for x in tensors))  # type: ignore[arg-type]
        return Case(self.q.to(device), kv, blocks, index, self.keys, self.values, self.selected, self.scale)


def make_case(
    spans: Sequence[tuple[int, int]] = ((0, 130),),  # (tokens before, new tokens) of each sequence
    *,
    tile: int = 64,  # 1: decode, every sequence has one new token
    ratio: int = 2,
    heads: Sequence[int] = (0, 1),
    layer_heads: int | None = None,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    density: float = 1.0,  # share of the pages selected beside the own ones
    tokens: int = 0,  # single tokens proposed for each tile
    windows: Sequence[tuple[int, int]] = (),  # (sink, window) to draw from for each sequence and head
    same_heads: bool = False,  # one selection for all heads
    shuffled: bool = True,
    fp8: bool = False,  # keys and values are kept so; `keys` and `values` are what that means
    seed: int = 0,
) -> Case:
    rng = random.Random(seed)
    gen = torch.Generator().manual_seed(seed)
    layer_heads = layer_heads or max(heads) + 1
    num_heads, lengths = len(heads), [past + new for past, new in spans]
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    order = list(range(sum(pages) + 3))
    if shuffled:
        rng.shuffle(order)

    rule = [[rng.choice(list(windows)) if windows else (0, UNLIMITED) for _ in heads] for _ in spans]
    table = torch.full((len(spans), max(pages)), NULL_PAGE, dtype=torch.int32)
    k_pool = torch.full((num_heads, len(order), PAGE_SIZE, dim), NAN, dtype=dtype)
    v_pool, scale = k_pool.clone(), None
    if fp8:
        k_pool, v_pool = k_pool.to(FP8), v_pool.to(FP8)
        scale = torch.full((2, *k_pool.shape[:3]), NAN, dtype=SCALE)
    keys, values = [], []
    for b, (past, _) in enumerate(spans):
        k, v = (torch.randn(lengths[b], num_heads, dim, generator=gen).to(dtype) for _ in range(2))
        scales: list[Tensor] = []
        if fp8:
            (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
            scales = [k_scale, v_scale]
        keys.append(k.double() * (scales[0][..., None].double() if fp8 else 1))
        values.append(v.double() * (scales[1][..., None].double() if fp8 else 1))
        for page in range(pages[b]):
            begin, end = page * PAGE_SIZE, min((page + 1) * PAGE_SIZE, lengths[b])
            seen = any(begin < sink or end > past - window + 1 for sink, window in rule[b])
            physical = order.pop(0)
            if seen:  # a page that no head may see was released: its memory belongs to nobody
                table[b, page] = physical
                k_pool[:, physical, : end - begin] = k[begin:end].transpose(0, 1)
                v_pool[:, physical, : end - begin] = v[begin:end].transpose(0, 1)
                if scale is not None:
                    scale[:, :, physical, : end - begin] = torch.stack(scales)[:, begin:end].transpose(1, 2)

    rows, token = [], 1  # row 0 of q belongs to nobody
    for b, (past, new) in enumerate(spans):
        pos = past
        while pos < past + new:
            count = min((pos // tile + 1) * tile, past + new) - pos
            rows.append(BlockRow(b, token, pos, count))
            token, pos = token + count, pos + count
        token += rng.randrange(2)
    blocks = QueryBlocks.of(tile, rows)
    total_heads = layer_heads * ratio
    q = torch.randn(total_heads, token + 1, dim, generator=gen).to(dtype).transpose(0, 1)  # not contiguous

    mask = torch.zeros(num_heads, len(rows), table.shape[1], dtype=torch.bool)
    single = torch.full((num_heads, len(rows), max(tokens, 1)), -1, dtype=torch.int32)
    selected: list[list[Tensor]] = [[] for _ in heads]
    for n, row in enumerate(rows):
        own = range(row.pos // PAGE_SIZE, (row.pos + row.count - 1) // PAGE_SIZE + 1)
        resident = [page for page in range(own[-1] + 1) if table[row.seq, page] != NULL_PAGE]
        for g in range(num_heads):
            if same_heads and g:
                mask[g, n], single[g, n] = mask[0, n], single[0, n]
                selected[g].append(selected[0][n])
                continue
            chosen = {page for page in resident if page in own or rng.random() < density}
            mask[g, n, sorted(chosen)] = True
            at = torch.tensor([p for page in sorted(chosen) for p in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)])
            loose = [
                p for page in resident if page not in chosen for p in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            ]
            extra = sorted(rng.sample(loose, min(len(loose), rng.randrange(tokens + 1))))
            single[g, n, : len(extra)] = torch.tensor(extra, dtype=torch.int32)
            selected[g].append(torch.cat((at, torch.tensor(extra, dtype=torch.long))))
    runs = list_pages(mask) + (list_tokens(single) if tokens else ())

    sink, window = (torch.tensor([[pair[i] for pair in row] for row in rule], dtype=torch.int32) for i in (0, 1))
    ints = [torch.tensor(x, dtype=torch.int32) for x in (lengths, list(heads))]
    kv = PagedKV(k_pool, v_pool, table, ints[0], ints[1], sink, window, ratio, scale=scale)
    return Case(q, kv, blocks, SparseIndex(*runs), keys, values, selected, dim**-0.5)


def reference(case: Case, softcap: float = 0.0, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [T, H] in float64; NaN where the kernel must not write."""
    ratio = case.kv.ratio
    out = torch.full(case.q.shape, NAN, dtype=torch.float64)
    lse = torch.full(case.q.shape[:2], NAN, dtype=torch.float64)
    for n, row in enumerate(case.blocks.rows):
        for g, head in enumerate(case.kv.heads.tolist()):
            in_run = torch.zeros(case.keys[row.seq].shape[0], dtype=torch.bool)
            at = case.selected[g][n]
            in_run[at[at < in_run.numel()]] = True
            key = torch.arange(in_run.numel())
            sink, window = int(case.kv.sink[row.seq, g]), int(case.kv.window[row.seq, g])
            for i in range(row.count):
                pos = row.pos + i
                seen = in_run & (key <= pos) & ((key > pos - window) | (key < sink))
                heads = slice(head * ratio, (head + 1) * ratio)
                scores = case.q[row.token + i, heads].double().cpu() @ case.keys[row.seq][seen, g].T * case.scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                total = scores.logsumexp(-1)
                if sinks is not None:
                    total = torch.logaddexp(total, sinks[heads].double().cpu())
                out[row.token + i, heads] = torch.exp(scores - total[:, None]) @ case.values[row.seq][seen, g]
                lse[row.token + i, heads] = total
    return out, lse


TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(out: Tensor, lse: Tensor, expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Right where something was due, untouched where not."""
    due = ~expected[1].isnan()
    assert out[due].isfinite().all() and lse[due].isfinite().all(), "NaN or infinity reached the result"
    assert out[~due].isnan().all() and lse[~due].isnan().all(), "rows were written that are none of the call's"
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out[due].double().cpu(), expected[0][due], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse[due].double().cpu(), expected[1][due], atol=max(tolerance, 1e-4) / 4, rtol=1e-4)
