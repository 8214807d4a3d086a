"""Store the new keys, select, attend: the function that transformers' layers call."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attention.index import build_index
from gossamer.attention.policy import OperatingPoint
from gossamer.attention.selectors import Dense, Proposal, Selector
from gossamer.attention.selectors.base import CORRECTION
from gossamer.attention.step import Step
from gossamer.kernels.dense_prefill import Way, chunks, dense_prefill, faster_way
from gossamer.kernels.dropped_pages import add_dropped_pages
from gossamer.kernels.layout import BlockRow, PagedKV, QueryBlocks, SparseIndex
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
        if step.filled is not None:
            for summary in step.views.summaries(layer)[group]:
                summary.write(kv, step.filled)
        for blocks in step.blocks:
            began = time.perf_counter()
            asked = _asked(step, layer, group, blocks)
            index = select(q, kv, blocks, step, asked, scale)
            step.reads.add(blocks, index)
            selected = time.perf_counter()
            if blocks.size == 1:
                paged_decode(q, kv, blocks, index, out, lse, scale=scale, softcap=softcap or 0.0, sinks=s_aux)
            else:
                handed = _handed_over(q, kv, blocks, step.views.unlimited(layer, group), asked, softcap, s_aux)
                for chunk, (way, _tiles) in handed.items():
                    dense_prefill(q, kv, chunk, out, scale=scale, softcap=softcap or 0.0, way=way)
                rest, left = _without(blocks, index, [tiles for _way, tiles in handed.values()])
                paged_prefill(q, kv, rest, left, out, lse, scale=scale, softcap=softcap or 0.0, sinks=s_aux)
            _correct(q, kv, blocks, step, index, asked, out, lse, scale, softcap or 0.0)
            if not q.is_cuda:
                step.reads.select_seconds += selected - began
                step.reads.attend_seconds += time.perf_counter() - selected
            if step.watch is not None:
                own = step.views.heads(layer)[group]
                step.watch.look(layer, own, q, kv, blocks, index, out, scale=scale, softcap=softcap or 0.0, sinks=s_aux)
    return out[None], None


Row = tuple[Selector, ...]  # one per head of a view
Blocks = tuple[int, ...] | None  # some of a step's blocks, or all
Asked = dict[Row, Blocks | frozenset[OperatingPoint]]  # whom each row is asked about: blocks, or those of some points

DENSE = Dense()


def _asked(step: Step, layer: int, group: int, blocks: QueryBlocks) -> Asked:
    """What the policies of the sequences in the step ask of one view's heads. Blocks below a selector's length are
    dense; a recorded step, which cannot know them, asks about them too."""
    heads = step.views.heads(layer)[group]
    rows: dict[OperatingPoint, Row] = {}
    for point in dict.fromkeys(step.points):
        policies = [point.heads[layer][head] for head in heads]
        rows[point] = tuple(policy.decode if blocks.size == 1 else policy.prefill for policy in policies)
    if step.recorded is not None:
        points: dict[Row, frozenset[OperatingPoint]] = {}
        for point, row in rows.items():
            points[row] = points.get(row, frozenset()) | {point}
        return {row: own if len(points) > 1 else None for row, own in points.items()}
    if len(rows) == 1:
        (only,) = rows.values()
        if all(selector.above == 0 for selector in only):
            return {only: None}
    found: dict[Row, list[int]] = {}
    for n, block in enumerate(blocks.rows):
        origin = block.pos // blocks.size * blocks.size
        row = tuple(s if s.above <= origin else DENSE for s in rows[step.points[block.seq]])
        found.setdefault(row, []).append(n)
    return {row: None if len(own) == len(blocks) else tuple(own) for row, own in found.items()}


def _handed_over(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    unlimited: Sequence[bool],
    asked: Asked,
    softcap: float | None,
    sinks: Tensor | None,
) -> dict[BlockRow, tuple[Way, list[int]]]:
    """The chunks that read everything and that others' kernels attend for faster, whose, and their tiles."""
    if sinks is not None:
        return {}
    dense: set[int] = set()
    for row, mine in asked.items():
        assert not isinstance(mine, frozenset), "prompts are not recorded"
        if all(isinstance(selector, Dense) for selector in row):
            dense.update(range(len(blocks)) if mine is None else mine)
    if not dense:
        return {}
    return {
        chunk: (way, tiles)
        for chunk, tiles in chunks(blocks)
        if unlimited[chunk.seq] and dense.issuperset(tiles) and (way := faster_way(q, kv, chunk, softcap or 0.0))
    }


def _without(blocks: QueryBlocks, index: SparseIndex, handed: Sequence[list[int]]) -> tuple[QueryBlocks, SparseIndex]:
    """What is left when the tiles of some chunks are done."""
    if not handed:
        return blocks, index
    done = {n for tiles in handed for n in tiles}
    left = [n for n in range(len(blocks)) if n not in done]
    return blocks.take(left), index.only(slice(None), left)


def select(q: Tensor, kv: PagedKV, blocks: QueryBlocks, step: Step, asked: Asked, scale: float) -> SparseIndex:
    """The index of one view's heads."""
    if any(selector.reads_tensors for row in asked for selector in row):
        return build_index(_propose(q, kv, blocks, step, asked, scale), kv, blocks)
    key = (id(kv.table), blocks.size, tuple(asked.items()))
    if key not in step.shared:
        step.shared[key] = build_index(_propose(q, kv, blocks, step, asked, scale), kv, blocks)
    return step.shared[key]


def _runs(row: Row) -> Iterator[tuple[Selector, slice]]:
    """Neighbouring heads with one selector."""
    for selector, run in groupby(range(len(row)), key=row.__getitem__):
        first, *rest = run
        yield selector, slice(first, first + 1 + len(rest))


def _propose(q: Tensor, kv: PagedKV, blocks: QueryBlocks, step: Step, asked: Asked, scale: float) -> Proposal:
    """Ask each selector about its own heads and blocks. Most layers have one selector."""
    selectors = {selector for row in asked for selector in row}
    if len(selectors) == 1 and (step.recorded is None or all(selector.above == 0 for selector in selectors)):
        return selectors.pop().propose(q, kv, blocks, scale)
    parts: list[tuple[slice, Tensor, Proposal]] = []
    for row, mine in asked.items():
        part = blocks.take(mine) if isinstance(mine, tuple) else blocks
        for selector, own in _runs(row):
            if not isinstance(selector, Dense):
                at = _places(blocks, step, mine, selector.above)
                parts.append((own, at, selector.propose(q, kv.only(own), part, scale)))
    return _assemble(parts, (len(kv.heads), len(blocks), kv.table.shape[1]), kv.table.device)


def _places(blocks: QueryBlocks, step: Step, mine: Blocks | frozenset[OperatingPoint], above: int = 0) -> Tensor:
    """Which blocks a selector is asked about: numbers, or in a recorded step [N] bool, those that begin at `above` or
    later. All layers ask for the same."""
    key = (blocks.size, mine, above)
    if key not in step.places:
        if step.recorded is None:
            assert not isinstance(mine, frozenset)
            numbers = range(len(blocks)) if mine is None else mine
            step.places[key] = torch.tensor(numbers, dtype=torch.long).to(blocks.pos.device, non_blocking=True)
        else:
            own = [step.recorded[point] for point in step.points if mine is None or point in mine]
            step.places[key] = torch.stack(own).any(0) & (blocks.origin >= above)
    return step.places[key]


def _correct(
    q: Tensor,
    kv: PagedKV,
    blocks: QueryBlocks,
    step: Step,
    index: SparseIndex,
    asked: Asked,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
) -> None:
    """Let dropped pages count through their means, for the heads whose selectors want that."""
    for row, mine in asked.items():
        for selector, own in _runs(row):
            if not selector.corrects:
                continue
            part = blocks.take(mine) if isinstance(mine, tuple) else blocks
            if isinstance(mine, frozenset):  # the others' blocks hold no query here
                part = replace(blocks, count=torch.where(_places(blocks, step, mine), blocks.count, 0))
            left = index.only(own, mine if isinstance(mine, tuple) else None)
            means = (kv.summaries[each.name][own] for each in CORRECTION)
            add_dropped_pages(q, kv.only(own), part, left, out, lse, *means, scale=scale, softcap=softcap)


def _assemble(
    parts: Sequence[tuple[slice, Tensor, Proposal]], shape: tuple[int, int, int], device: torch.device
) -> Proposal:
    """Proposals for some heads and blocks -> one for all, [G, N, L], dense for blocks that nobody was asked about. The
    blocks are given by number, or as [N] bool; then the proposal is one for all of them."""
    pages = torch.ones(shape, dtype=torch.bool, device=device)
    widest = max((p.tokens.shape[-1] for _, _, p in parts if p.tokens is not None), default=0)
    tokens = torch.full((*shape[:2], widest), -1, dtype=torch.int32, device=device) if widest else None
    for own, at, proposal in parts:
        tables = [(pages, proposal.pages)]
        if tokens is not None and proposal.tokens is not None:
            tables.append((tokens[..., : proposal.tokens.shape[-1]], proposal.tokens))
        for table, found in tables:
            if at.dtype == torch.bool:
                table[own] = torch.where(at[:, None], found, table[own])
            else:
                table[own, at] = found
    return Proposal(pages, tokens)
