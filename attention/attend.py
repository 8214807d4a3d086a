"""Store the new keys, select, attend: the function that transformers' layers call."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attention.index import build_index
from gossamer.attention.policy import HeadPolicy, OperatingPoint
from gossamer.attention.selectors import Proposal, Selector
from gossamer.attention.step import Step
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.store import store


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    step: Step,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D], after RoPE -> [1, T, H, D].

    The signature is that of transformers' attention functions; `step` is ours and arrives through the model's keyword
    arguments. `softcap` is Gemma 2's, `s_aux` [H] the sink logits of GPT-OSS. Windows come with the step's views.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    layer = module.layer_idx  # every attention module of transformers has one
    assert isinstance(layer, int)
    for group, kv in enumerate(step.views.layer(layer)):
        for blocks in step.blocks:
            store(k, v, kv, blocks)
        for blocks in step.blocks:
            index = select(q, kv, blocks, step, layer, group)
            kernel = paged_decode if blocks.size == 1 else paged_prefill
            kernel(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap or 0.0, sinks=s_aux)
    return out[None], None


def select(q: Tensor, kv: PagedKV, blocks: QueryBlocks, step: Step, layer: int, group: int) -> SparseIndex:
    """The index of one view's heads, as the policies of the sequences in the step ask for it."""
    heads = step.views.heads(layer)[group]
    asked = {point: _selectors(point.heads[layer], heads, blocks) for point in dict.fromkeys(step.points)}
    if any(selector.reads_tensors for row in asked.values() for selector in row):
        return build_index(_propose(q, kv, blocks, step, asked), kv, blocks)
    key = (id(kv.table), blocks.size, tuple(asked.values()))
    if key not in step.shared:
        step.shared[key] = build_index(_propose(q, kv, blocks, step, asked), kv, blocks)
    return step.shared[key]


def _selectors(policies: Sequence[HeadPolicy], heads: Sequence[int], blocks: QueryBlocks) -> tuple[Selector, ...]:
    """One selector per head of the view."""
    return tuple(policies[head].decode if blocks.size == 1 else policies[head].prefill for head in heads)


def _propose(
    q: Tensor, kv: PagedKV, blocks: QueryBlocks, step: Step, asked: Mapping[OperatingPoint, tuple[Selector, ...]]
) -> Proposal:
    """Ask each selector about its own heads and blocks. Most layers have one selector."""
    if len(selectors := {selector for row in asked.values() for selector in row}) == 1:
        return selectors.pop().propose(q, kv, blocks)
    parts: list[tuple[slice, list[int], Proposal]] = []
    for point, row in asked.items():
        mine = [n for n, block in enumerate(blocks.rows) if step.points[block.seq] == point]
        part = blocks if len(mine) == len(blocks) else blocks.take(mine)
        for selector, run in groupby(range(len(row)), key=row.__getitem__):
            first, *rest = run
            own = slice(first, first + 1 + len(rest))
            if mine:
                parts.append((own, mine, selector.propose(q, kv.only(own), part)))
    return _assemble(parts, (len(kv.heads), len(blocks), kv.table.shape[1]), kv.table.device)


def _assemble(
    parts: Sequence[tuple[slice, list[int], Proposal]], shape: tuple[int, int, int], device: torch.device
) -> Proposal:
    """Proposals for some heads and blocks -> one for all, [G, N, L]."""
    pages = torch.zeros(shape, dtype=torch.bool, device=device)
    widest = max((p.tokens.shape[-1] for _, _, p in parts if p.tokens is not None), default=0)
    tokens = torch.full((*shape[:2], widest), -1, dtype=torch.int32, device=device) if widest else None
    for own, mine, proposal in parts:
        rows = torch.tensor(mine, device=device)
        pages[own, rows] = proposal.pages
        if tokens is not None and proposal.tokens is not None:
            tokens[own, rows, : proposal.tokens.shape[-1]] = proposal.tokens
    return Proposal(pages, tokens)
