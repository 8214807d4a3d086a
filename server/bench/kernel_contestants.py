"""The operations of the kernel table, ready to be called, on one layer of noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gossamer.attention.index import build_index
from gossamer.attention.selectors.base import Proposal
from gossamer.attention.selectors.budget import Budget
from gossamer.kernels import page_summaries
from gossamer.kernels.antidiagonal import antidiagonal_mass
from gossamer.kernels.choose import choose_tokens
from gossamer.kernels.dense_prefill import chunks, dense_prefill, ways
from gossamer.kernels.dropped_pages import add_dropped_pages
from gossamer.kernels.layout import PAGE_SIZE, QueryBlocks
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.probe import probe_mass
from gossamer.kernels.score_pages import bound_mass, page_mass
from gossamer.kernels.score_tokens import label_mass
from gossamer.kernels.store import store
from gossamer.kvcache.summaries import KeyBounds
from gossamer.server.bench import work
from gossamer.server.bench.layer import Layer
from gossamer.server.bench.peers import flash_attns, sdpa, torchs
from gossamer.server.bench.work import Work

DENSE = "attention, dense"
SHARE = 0.9  # of the mass, for top-p
PROBE = 64  # queries of vertical-slash
STRETCHES = PAGE_SIZE // KeyBounds().tokens


@dataclass(frozen=True)
class Contestant:
    """One line of the table."""

    op: str
    call: Callable[[], object]
    work: Work
    density: float | None = None  # share of the causal (query, key) pairs; None where the operation attends to nothing


class Contest:
    """Queries of one layer, prompts or single tokens, and what their contestants share."""

    def __init__(self, layer: Layer, blocks: QueryBlocks, budget: Budget) -> None:
        self.layer, self.kv, self.blocks, self.budget = layer, layer.kv, blocks, budget
        self.shape, self.scale = layer.shape, layer.shape.scale
        self.q = layer.queries(blocks)
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(self.q.shape[:2], dtype=torch.float32, device=self.shape.device)
        self.masses = layer.masses(blocks)
        self.mask, self.index = layer.sparse(blocks, self.masses, budget)
        self.entries = int(self.index.count.sum())
        self.least = work.Sizes(
            self.shape.query_heads,
            self.shape.kv_heads,
            self.shape.head_dim,
            self.q.element_size(),
            layer.batch,
            layer.length,
            tuple(work.Tile(row.pos, row.count) for row in blocks.rows),
        )

    def attentions(self) -> list[Contestant]:
        """Ours, dense and sparse, with the index given; then torch's."""
        dense, kernel = self.layer.dense(self.blocks), paged_decode if self.blocks.size == 1 else paged_prefill
        found = []
        for op, index in ((DENSE, dense), ("attention, sparse", self.index)):
            pairs = self.least.pairs(index.count.sum(0).tolist())
            call = partial(kernel, self.q, self.kv, self.blocks, index, self.out, self.lse, scale=self.scale)
            least = self.least.attention(pairs, int(index.count.sum()))
            found.append(Contestant(op, call, least, pairs / self.least.dense_pairs))
        return found

    def peers(self, refused: Callable[[str], None]) -> list[Contestant]:
        """Those to whom prompts can be handed over, and others' attention over keys and values side by side."""
        prompts, whole = self.blocks.size > 1, self.layer.whole
        q = self.q.view(self.layer.batch, -1, *self.q.shape[1:]).transpose(1, 2)
        calls: dict[str, Callable[[], object]] = {}
        if prompts and self.shape.device != "cpu":
            ((chunk, _),) = chunks(self.blocks)
            for way in ways(self.q, self.kv):
                handed = partial(dense_prefill, self.q, self.kv, chunk, self.out, scale=self.scale, way=way)
                calls[f"handed to {way}"] = handed
        for name, call in torchs(partial(sdpa, q, *whole, causal=prompts), self.shape.device, refused).items():
            calls[name if name == "torch" else f"torch {name}"] = call
        calls |= flash_attns(q, *whole, causal=prompts, refused=refused)
        least = self.least.attention(self.least.dense_pairs, 0)
        return [Contestant(f"attention, {name}", call, least, 1.0) for name, call in calls.items()]

    def means(self) -> Tensor:
        """[G, P, D], of every page, full or not."""
        return self.kv.k.mean(2)

    def page_scores(self) -> list[Contestant]:
        """By mean keys, and by a gate whose keys are as wide as a head."""
        rows = tuple(row._replace(token=n, count=1) for n, row in enumerate(self.blocks.rows))
        token = torch.arange(len(rows), dtype=torch.int32, device=self.shape.device)
        pooled = replace(self.blocks, rows=rows, token=token, count=torch.ones_like(token))
        gate, single, keys = self.shape.noise(len(rows), self.shape.kv_heads), replace(self.kv, ratio=1), self.means()
        mean = partial(page_mass, self.q, self.kv, self.blocks, keys, scale=self.scale)
        gated = partial(page_mass, gate, single, pooled, keys, scale=self.scale)
        return [
            Contestant("select: mean keys", mean, self.least.page_scores()),
            Contestant("select: gate", gated, self.least.gate_scores()),
        ]

    def bound_scores(self) -> Contestant:
        keys = self.kv.k.unflatten(2, (STRETCHES, -1))
        bounds = torch.stack((keys.amin(3), keys.amax(3)), 3)
        call = partial(bound_mass, self.q, self.kv, self.blocks, bounds, scale=self.scale)
        return Contestant("select: bounds", call, self.least.bound_scores(STRETCHES))

    def label_scores(self) -> Contestant:
        channels = self.shape.labels().on_device
        at = channels.long()[:, None, None].expand(-1, *self.kv.k.shape[1:3], -1)
        labels = self.kv.k.gather(3, at)
        call = partial(label_mass, self.q, self.kv, self.blocks, labels, channels, scale=self.scale)
        return Contestant("select: labels", call, self.least.label_scores(channels.shape[1]))

    def antidiagonal_scores(self, stride: int) -> Contestant:
        call = partial(antidiagonal_mass, self.q, self.kv, self.blocks, stride, scale=self.scale)
        return Contestant(f"select: antidiagonal {stride}", call, self.least.antidiagonal_scores(stride))

    def probe(self) -> Contestant:
        call = partial(probe_mass, self.q, self.kv, self.blocks, PROBE, scale=self.scale)
        return Contestant("select: probe", call, self.least.probe(PROBE))

    def dropped_pages(self) -> Contestant:
        """Pages that are not read count through their means."""
        means = self.means(), self.kv.v.mean(2)
        given = (self.q, self.kv, self.blocks, self.index, self.out, self.lse, *means)
        seen = torch.tensor([tile.seen for tile in self.least.tiles], device=self.shape.device)
        dropped = ((seen - self.index.count) * self.blocks.count).sum()
        call = partial(add_dropped_pages, *given, scale=self.scale)
        return Contestant("dropped pages", call, self.least.dropped_pages(int(dropped)))

    def choices(self) -> list[Contestant]:
        """From masses to pages, and to an index."""
        pages, given = self.least.choose_pages(), (self.masses, self.kv, self.blocks)
        index = partial(build_index, Proposal(self.mask), self.kv, self.blocks)
        return [
            Contestant("choose: top-k", partial(self.budget.pages, *given), pages),
            Contestant("choose: top-p", partial(Budget("mass", SHARE).pages, *given), pages),
            Contestant("build index", index, self.least.build_index(self.entries)),
        ]

    def token_choice(self, tokens: int) -> Contestant:
        """Single tokens, for double-sparsity."""
        masses = self.masses[..., None].expand(*self.masses.shape, PAGE_SIZE) * torch.rand(
            *self.masses.shape, PAGE_SIZE, device=self.shape.device
        )
        tokens = min(tokens, self.least.width * PAGE_SIZE)
        call = partial(choose_tokens, masses.flatten(-2), tokens, 1.0)
        return Contestant("choose: tokens", call, self.least.choose_tokens(tokens))

    def store(self) -> Contestant:
        tokens = self.q.shape[0]
        k, v = (self.shape.noise(tokens, self.shape.kv_heads) for _ in range(2))
        return Contestant("store", partial(store, k, v, self.kv, self.blocks), self.least.store())

    def summaries(self) -> list[Contestant]:
        """Of every full page, as if the step filled them all."""
        full, dim = self.layer.length // PAGE_SIZE, self.shape.head_dim
        physical = self.kv.table[:, :full].flatten()
        first = (torch.arange(full, dtype=torch.int32, device=self.shape.device) * PAGE_SIZE).repeat(self.layer.batch)
        channels = self.shape.labels().on_device
        inv_freq = 10000.0 ** -(torch.arange(dim // 2, device=self.shape.device) * 2 / dim)
        pages, few = self.kv.k.shape[:2], channels.shape[1]

        def table(*shape: int, dtype: torch.dtype = self.shape.dtype) -> Tensor:
            return torch.empty(*pages, *shape, dtype=dtype, device=self.shape.device)

        pools, wide = table(3, dim, dtype=torch.float32), 3 * 4 / self.q.element_size()
        given, labelled = (self.kv.k, physical), PAGE_SIZE * few / dim
        calls: list[tuple[str, Callable[[], object], Work]] = [
            ("means", partial(page_summaries.page_means, *given, table(dim)), self.least.summaries(1)),
            (
                "bounds",
                partial(page_summaries.page_bounds, *given, table(STRETCHES, 2, dim)),
                self.least.summaries(2 * STRETCHES),
            ),
            (
                "labels",
                partial(page_summaries.page_labels, *given, channels, table(PAGE_SIZE, few)),
                self.least.summaries(labelled, read=labelled),
            ),
            (
                "gate pools",
                partial(page_summaries.page_pools, *given, first, inv_freq, 1.0, pools),
                self.least.summaries(wide),
            ),
        ]
        return [Contestant(f"write {name}", call, least) for name, call, least in calls]


def prefill(layer: Layer, share: float, refused: Callable[[str], None]) -> list[Contestant]:
    """A whole prompt in one step."""
    contest = Contest(layer, layer.prompts(), Budget("share", share))
    return [
        *contest.attentions(),
        *contest.peers(refused),
        *contest.page_scores(),
        contest.antidiagonal_scores(8),
        contest.antidiagonal_scores(16),
        contest.probe(),
        *contest.choices(),
        contest.dropped_pages(),
        contest.store(),
        *contest.summaries(),
    ]


def decode(layer: Layer, tokens: int, refused: Callable[[str], None]) -> list[Contestant]:
    """One more token of every sequence."""
    contest = Contest(layer, layer.newest(), Budget("tokens", tokens))
    return [
        *contest.attentions(),
        *contest.peers(refused),
        *contest.page_scores(),
        contest.bound_scores(),
        contest.label_scores(),
        *contest.choices(),
        contest.token_choice(tokens),
        contest.store(),
    ]
