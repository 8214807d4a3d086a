"""What every candidate does to every head's output, on real prompts: error, recall and density against dense attention.

Nothing is done to the model: it reads under dense attention, and in every layer some of each chunk's query blocks are
attended to again, once per candidate, by the server's own selectors and kernels. Memory is that of one chunk.
"""

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.index import build_index
from gossamer.attention.policy_view import Phase
from gossamer.attention.profiling.candidates import Candidate
from gossamer.attention.profiling.projection import gram_of_heads, output_weight, squared_errors
from gossamer.attention.profiling.prompts import Exchange
from gossamer.attention.profiling.reading import LayerCall, Shape
from gossamer.attention.selectors import BlockSparse, Dense, LearnedGate, Proposal, Selector
from gossamer.attention.selectors.base import CORRECTION
from gossamer.attention.step import Step
from gossamer.kernels.dropped_pages import add_dropped_pages
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kvcache.summaries import Summary

REGIONS = ("asked", "text")  # question and answer; everything else
CHUNKS = 3  # that are tried, beside those of the question and the answer
TILES = 2  # query blocks of each chunk that are tried beside its last ones, and single queries times four
PROBED = 64  # the chunk's last queries are always tried: some candidates choose by them


@dataclass(frozen=True, slots=True)
class Tables:
    """Sums over the queries that were tried of one phase, for C candidates; float64 on the CPU.

    error [C, layers, G, regions]: squared error behind the output projection. norm [layers, regions]: squared norm
    there of the layer's whole attention output. recall [C, layers, G, regions]: share of the dense attention mass that
    is kept. queries [regions]. read [C, layers, G] and possible [layers, G]: pages times queries; singles is what was
    read as single tokens, of `read`.
    """

    error: Tensor
    norm: Tensor
    recall: Tensor
    queries: Tensor
    read: Tensor
    possible: Tensor
    singles: Tensor

    @classmethod
    def empty(cls, candidates: int, shape: Shape) -> "Tables":
        layers, heads, regions = shape.layers, shape.kv_heads, len(REGIONS)
        sizes = (
            (candidates, layers, heads, regions),
            (layers, regions),
            (candidates, layers, heads, regions),
            (regions,),
            (candidates, layers, heads),
            (layers, heads),
            (candidates, layers, heads),
        )
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))


class Calibration:
    """Looks on while one exchange is read, and tries candidates. `tables` has what came of it.

    summaries [layer][KV head] is what a reader has to keep of full pages for it.
    """

    def __init__(
        self, candidates: Mapping[Phase, Sequence[Candidate]], shape: Shape, artefacts: Artefacts, seed: int
    ) -> None:
        self._shape, self._seed = shape, seed
        self._selectors: dict[Phase, list[list[Selector]]] = {
            phase: [
                [each.selector(layer, shape, artefacts) for each in own] if layer in shape.free else []
                for layer in range(shape.layers)
            ]
            for phase, own in candidates.items()
        }
        self._windows = {phase: [each.window for each in own] for phase, own in candidates.items()}
        self._grams: dict[int, tuple[Tensor, Tensor]] = {}
        self._candidates = candidates
        self._step: Step | None = None
        self._tried: dict[Phase, QueryBlocks] = {}
        self._asked = 0
        self._chunks: frozenset[int] = frozenset()
        self.tables: dict[Phase, Tables] = {}

    @property
    def summaries(self) -> list[list[tuple[Summary, ...]]]:
        rows = []
        for layer in range(self._shape.layers):
            own = (s for phase in self._selectors.values() for s in phase[layer])
            rows.append([tuple(dict.fromkeys(each for s in own for each in s.summaries))] * self._shape.kv_heads)
        return rows

    def begin(self, exchange: Exchange, chunk: int) -> None:
        """Before an exchange is read, in chunks of so many tokens."""
        self._asked, self._step = exchange.question, None
        starts = range(0, exchange.prompt, chunk)
        self._chunks = frozenset(random.Random(self._seed).sample(starts, min(CHUNKS, len(starts))))
        self.tables = {phase: Tables.empty(len(own), self._shape) for phase, own in self._candidates.items()}

    def layer(self, call: LayerCall) -> None:
        (span,) = call.step.spans
        if span.first not in self._chunks and span.first + span.new <= self._asked:
            return
        if call.step is not self._step:
            self._step, self._tried = call.step, self._choose(call.step)
            for phase, blocks in self._tried.items():
                for region, _ in enumerate(REGIONS):
                    self.tables[phase].queries[region] += int((_regions(blocks, self._asked) == region).sum())
        if self._shape.windows[call.layer] is not None:
            return
        (kv,) = call.step.views.layer(call.layer)
        if call.layer not in self._grams:
            weight = output_weight(call.module, self._shape)
            self._grams[call.layer] = weight, gram_of_heads(weight, self._shape)
        for phase, blocks in self._tried.items():
            self._try_all(call, kv, phase, blocks)

    def _try_all(self, call: LayerCall, kv: PagedKV, phase: Phase, blocks: QueryBlocks) -> None:
        tables, layer, device = self.tables[phase], call.layer, call.q.device
        token = torch.tensor([t for row in blocks.rows for t in range(row.token, row.token + row.count)], device=device)
        region = _regions(blocks, self._asked).to(device)
        member = torch.stack([region == number for number in range(len(REGIONS))]).double()  # [regions, rows]
        dense, dense_lse, index = _attend(call, kv, blocks, Dense())
        weight, gram = self._grams[layer]
        norm = (dense[token].float().flatten(1) @ weight.T).square().sum(-1).double()
        tables.norm[layer] += (member @ norm).cpu()
        tables.possible[layer] += _pages(index, blocks).cpu()
        masses: dict[Hashable, Tensor] = {}
        for number, selector in enumerate(self._selectors[phase][layer]):
            window = self._windows[phase][number]
            if window is None:
                out, lse, index = _attend(call, kv, blocks, selector, masses)
            else:
                out, lse, index = _attend(call, _streaming(kv, *window), blocks, Dense())
            kept = (lse[token] - dense_lse[token]).exp().clamp(max=1).unflatten(1, (self._shape.kv_heads, -1)).mean(2)
            tables.recall[number, layer] += (member @ kept.double()).T.cpu()
            if selector.corrects:
                means = (kv.summaries[each.name] for each in CORRECTION)
                add_dropped_pages(call.q, kv, blocks, index, out, lse, *means, scale=call.scale, softcap=call.softcap)
            errors = squared_errors(out[token].float() - dense[token].float(), gram).double()  # [rows, G]
            tables.error[number, layer] += (member @ errors).T.cpu()
            singles = _singles(index, blocks).cpu()
            tables.read[number, layer] += _pages(index, blocks).cpu() + singles
            tables.singles[number, layer] += singles

    def _choose(self, step: Step) -> dict[Phase, QueryBlocks]:
        """The blocks of this chunk that are tried: its last ones, those of the question, and some anywhere; generated
        tokens all, and single queries of the prompt in their place."""
        (span,) = step.spans
        rng = random.Random(f"{self._seed}/{span.first}")
        single = [] if step.decode is None else list(step.decode.rows)
        tried: dict[Phase, QueryBlocks] = {}
        if step.prefill is not None:
            rows = step.prefill.rows
            last = rows[-1].pos + rows[-1].count
            chosen = {n for n, row in enumerate(rows) if row.pos + row.count > min(last - PROBED, self._asked)}
            chosen |= set(rng.sample(range(len(rows)), min(TILES, len(rows))))
            tried["prefill"] = step.prefill.take(sorted(chosen))
            for row in rng.sample(rows, min(4 * TILES, len(rows))):
                at = rng.randrange(row.count)
                single.append(BlockRow(row.seq, row.token + at, row.pos + at, 1))
        tried["decode"] = QueryBlocks.of(1, sorted(single, key=lambda row: row.pos), self._shape.device)
        return tried


def _regions(blocks: QueryBlocks, asked: int) -> Tensor:
    """[rows], an index into REGIONS for every query."""
    places = [pos for row in blocks.rows for pos in range(row.pos, row.pos + row.count)]
    return torch.tensor([0 if pos >= asked else 1 for pos in places])


def _streaming(kv: PagedKV, sink: int, recent: int) -> PagedKV:
    """The same memory as a head sees it that keeps only these tokens."""
    return replace(kv, sink=torch.full_like(kv.sink, sink), window=torch.full_like(kv.window, recent))


def _attend(
    call: LayerCall,
    kv: PagedKV,
    blocks: QueryBlocks,
    selector: Selector,
    masses: dict[Hashable, Tensor] | None = None,
) -> tuple[Tensor, Tensor, SparseIndex]:
    """out [T, H, D] and lse [T, H], of which the blocks' rows are written, and what was read. masses: what selectors
    with different budgets share."""
    if masses is not None and isinstance(selector, BlockSparse | LearnedGate):
        if selector.scored_by not in masses:
            masses[selector.scored_by] = selector.mass(call.q, kv, blocks, call.scale)
        proposal = Proposal(selector.budget.pages(masses[selector.scored_by], kv, blocks))
    else:
        proposal = selector.propose(call.q, kv, blocks, call.scale)
    index = build_index(proposal, kv, blocks)
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    lse = torch.empty(call.q.shape[:2], dtype=torch.float32, device=call.q.device)
    attend = paged_decode if blocks.size == 1 else paged_prefill
    attend(call.q, kv, blocks, index, out, lse, scale=call.scale, softcap=call.softcap, sinks=call.sinks)
    return out, lse, index


def _pages(index: SparseIndex, blocks: QueryBlocks) -> Tensor:
    """[G] float64, pages times queries."""
    return (index.count.double() * blocks.count).sum(1)


def _singles(index: SparseIndex, blocks: QueryBlocks) -> Tensor:
    """The same for single tokens, as parts of a page."""
    if index.token_count is None:
        return torch.zeros(len(index.count), dtype=torch.float64, device=index.count.device)
    return (index.token_count.double() * blocks.count).sum(1) / PAGE_SIZE
