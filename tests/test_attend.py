"""`attend` over a real cache: groups of heads, operating points and chunk sizes, against the definition in float64."""

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from attend_cases import Life, run, uniform
from torch import Tensor

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import BlockSparse, Budget, Dense, Proposal, Selector, SinkRecent
from gossamer.attention.step import TILE_ROWS
from gossamer.kernels.dense_prefill import Way
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, PagedKV, QueryBlocks
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent
from gossamer.kvcache.summaries import Summary

RATIO, DIM, KV_HEADS = 2, 32, 4
TILE = TILE_ROWS // RATIO


@dataclass(frozen=True)
class Nothing:
    """Proposes nothing at all."""

    reads_tensors: ClassVar[bool] = False
    above: ClassVar[int] = 0
    corrects: ClassVar[bool] = False
    summaries: ClassVar[tuple[Summary, ...]] = ()

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        return Proposal(torch.zeros(kv.heads.numel(), len(blocks), kv.table.shape[1], dtype=torch.bool))


@dataclass(frozen=True)
class Multiples:
    """Single tokens: every `step`-th. Notes for which heads it was asked."""

    step: int
    above: int = 0
    reads_tensors: ClassVar[bool] = True
    corrects: ClassVar[bool] = False
    summaries: ClassVar[tuple[Summary, ...]] = ()
    asked: list[list[int]] = field(default_factory=list, compare=False)

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        self.asked.append(kv.heads.tolist())
        shape = kv.heads.numel(), len(blocks)
        tokens = torch.arange(0, kv.table.shape[1] * PAGE_SIZE, self.step, dtype=torch.int32)
        none = torch.zeros(*shape, kv.table.shape[1], dtype=torch.bool)
        return Proposal(none, tokens.expand(*shape, -1).contiguous())


@dataclass(frozen=True)
class CountedDense(Dense):
    """Dense, and counts how often it was asked."""

    asked: list[int] = field(default_factory=list, compare=False)

    def propose(self, q: Tensor, kv: PagedKV, blocks: QueryBlocks, scale: float) -> Proposal:
        self.asked.append(len(blocks))
        return Dense.propose(self, q, kv, blocks, scale)


def reads(selector: Selector, pos: int, key: int, tile: int) -> bool:
    """Whether a selector's definition, with what build_index adds to it, has the query at `pos` read `key`."""
    origin, page = pos // tile * tile, key // PAGE_SIZE
    if page == 0 or page >= origin // PAGE_SIZE:
        return True
    match selector:
        case SinkRecent(sink, recent):
            return page * PAGE_SIZE < sink or (page + 1) * PAGE_SIZE > origin + 1 - recent
        case Nothing():
            return False
        case Multiples(step=step):
            return key % step == 0
        case _:
            return True


def right_of(life: Life, layer: int, *, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """[T, H, D] float64, one query head at a time."""
    out = torch.empty(life.q.shape, dtype=torch.float64)
    for head, policy in enumerate(life.point.heads[layer]):
        mask = torch.zeros(life.length, life.length, dtype=torch.bool)
        for pos in range(life.length):
            selector, tile = (policy.prefill, TILE) if pos < life.prompt else (policy.decode, 1)
            sink, window = policy.keep.sink, policy.keep.window
            mask[pos, : pos + 1] = torch.tensor(
                [reads(selector, pos, key, tile) and (key > pos - window or key < sink) for key in range(pos + 1)]
            )
        for query_head in range(head * RATIO, (head + 1) * RATIO):
            scores = life.q[:, query_head].double() @ life.k[:, head].double().T * DIM**-0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~mask, -math.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[query_head].double().expand(life.length, 1)], 1)
            weights = scores.softmax(1)[:, : life.length]
            out[:, query_head] = weights @ life.v[:, head].double()
    return out


STREAMING = HeadPolicy(Dense(), Dense(), KeepSinkRecent(3, 90))
WINDOWED = HeadPolicy(SinkRecent(10, 60), SinkRecent(64, 65), KeepSinkRecent(70, 100))
SPARSE = HeadPolicy(SinkRecent(65, 30), SinkRecent(1, 1), KeepAll())
LOOSE = HeadPolicy(Multiples(7), Multiples(5), KeepAll())
EMPTY = HeadPolicy(Nothing(), Nothing(), KeepAll())

MIXED = AttentionPolicy(
    "mixed",
    (
        uniform("exact", DENSE, DENSE, DENSE, DENSE),
        uniform("fast", SPARSE, STREAMING, STREAMING, DENSE),
        uniform("odd", EMPTY, WINDOWED, STREAMING, LOOSE),
    ),
)


def mixed_lives() -> list[Life]:
    exact, fast, odd = MIXED.points
    lengths = ((70, 60, exact), (300, 290, fast), (230, 150, odd), (20, 20, odd), (260, 255, exact), (129, 100, fast))
    return [Life(length, prompt, point, seed) for seed, (length, prompt, point) in enumerate(lengths)]


@pytest.fixture(scope="module")
def right() -> list[Tensor]:
    return [right_of(life, 0) for life in mixed_lives()]


@pytest.mark.parametrize("chunk", [1000, 37])
@pytest.mark.parametrize("together", [True, False])
def test_every_head_reads_what_its_policy_says(chunk: int, together: bool, right: list[Tensor]) -> None:
    """Three groups of heads, three operating points in one batch, prompt and generated tokens in one span."""
    outs = run(MIXED, mixed_lives(), lambda: chunk, together=together)
    for out, expected in zip(outs, right, strict=True):
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_chunks_of_any_length(right: list[Tensor]) -> None:
    rng = random.Random(1)
    outs = run(MIXED, mixed_lives(), lambda: rng.choice([1, 1, 2, 31, 65, 130]))
    for out, expected in zip(outs, right, strict=True):
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_softcap_and_sinks_reach_the_kernels() -> None:
    policy = AttentionPolicy("p", (uniform("fast", SPARSE, STREAMING, DENSE, LOOSE),))
    lives = [Life(200, 150, policy.points[0], 5)]
    sinks = torch.linspace(-1, 2, KV_HEADS * RATIO)
    (out,) = run(policy, lives, lambda: 50, softcap=3.0, s_aux=sinks)
    torch.testing.assert_close(out.double(), right_of(lives[0], 0, softcap=3.0, sinks=sinks), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("chunk", [1000, 50])
def test_chunks_that_read_everything_may_be_handed_over(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of sequences with dense heads alone; their neighbours, and generated tokens, stay with our kernels."""
    handed: list[BlockRow] = []

    def faster_way(q: Tensor, kv: PagedKV, chunk: BlockRow, softcap: float) -> Way:
        handed.append(chunk)
        return Way.TORCH

    def paged(q: Tensor, kv: PagedKV, blocks: QueryBlocks, *rest: Any, **options: Any) -> None:
        own.append(sum(row.count for row in blocks.rows))
        paged_prefill(q, kv, blocks, *rest, **options)

    own: list[int] = []
    monkeypatch.setattr("gossamer.attention.attend.faster_way", faster_way)
    monkeypatch.setattr("gossamer.attention.attend.paged_prefill", paged)
    later = HeadPolicy(Multiples(7, above=256), Dense(), KeepAll())
    points = (
        uniform("exact", *[DENSE] * KV_HEADS),
        uniform("sparse", SPARSE, DENSE, DENSE, DENSE),
        uniform("later", *[later] * KV_HEADS),
    )
    policy = AttentionPolicy("p", points)
    lengths = ((300, 290, 0), (200, 190, 1), (70, 60, 0), (120, 110, 2), (20, 0, 0))
    lives = [Life(length, prompt, points[point], length) for length, prompt, point in lengths]
    outs = run(policy, lives, lambda: chunk)
    for life, out in zip(lives, outs, strict=True):
        known = life if life.point is not points[2] else replace(life, point=points[0])  # dense below its length
        torch.testing.assert_close(out.double(), right_of(known, 0), atol=2e-5, rtol=2e-5)
    assert sum(row.count for row in handed) == 290 + 60 + 110 and sum(own) == 190


def test_windows_and_sinks_are_never_handed_over_and_softcaps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    softcaps: list[float] = []

    def faster_way(q: Tensor, kv: PagedKV, chunk: BlockRow, softcap: float) -> None:
        softcaps.append(softcap)

    monkeypatch.setattr("gossamer.attention.attend.faster_way", faster_way)
    streaming, dense = (AttentionPolicy("p", (uniform("all", *[head] * KV_HEADS),)) for head in (STREAMING, DENSE))
    run(streaming, [Life(200, 200, streaming.points[0], 1)], lambda: 1000)
    run(dense, [Life(200, 200, dense.points[0], 1)], lambda: 1000, s_aux=torch.zeros(KV_HEADS * RATIO))
    assert not softcaps
    run(dense, [Life(200, 200, dense.points[0], 1)], lambda: 1000, softcap=3.0)
    assert set(softcaps) == {3.0}


@pytest.mark.parametrize("chunk", [1000, 50])
def test_everything_selected_equals_dense(chunk: int) -> None:
    """To the last bit with whole pages; nearly with single tokens, which are read in another order."""
    everything = SinkRecent(2**20, 2**20)
    answers = []
    for selector in (Dense(), everything, Multiples(1)):
        head = HeadPolicy(selector, selector, KeepAll())
        policy = AttentionPolicy("p", (uniform("all", *[head] * KV_HEADS),))
        lives = [Life(n, n - 5, policy.points[0], n) for n in (40, 200, 250)]
        answers.append(run(policy, lives, lambda: chunk))
    for dense, pages, tokens in zip(*answers, strict=True):
        assert torch.equal(dense, pages)
        torch.testing.assert_close(dense, tokens, atol=2e-6, rtol=2e-5)


def test_a_selector_is_not_asked_below_its_length() -> None:
    """Blocks that begin before it are dense, generated tokens as well, whatever the chunk."""
    loose = Multiples(1000, above=128)
    head = HeadPolicy(loose, loose, KeepAll())
    policy = AttentionPolicy("p", (uniform("all", *[head] * KV_HEADS),))
    dense = AttentionPolicy("p", (uniform("all", *[DENSE] * KV_HEADS),))
    for chunk in (1000, 50):
        (out,) = run(policy, [Life(300, 250, policy.points[0], 3)], lambda chunk=chunk: chunk)  # type: ignore[misc]
        (full,) = run(dense, [Life(300, 250, dense.points[0], 3)], lambda chunk=chunk: chunk)  # type: ignore[misc]
        torch.testing.assert_close(out[:128], full[:128], atol=2e-6, rtol=2e-5)
        assert (out[192:] - full[192:]).abs().amax((1, 2)).min() > 1e-3
    below = Multiples(1000, above=64)
    policy = AttentionPolicy("p", (uniform("all", *[HeadPolicy(below, Dense(), KeepAll())] * KV_HEADS),))
    run(policy, [Life(60, 60, policy.points[0], 3)], lambda: 100)
    assert below.asked == []


def test_positions_alone_are_asked_once_for_all_layers() -> None:
    """One index serves every layer whose heads ask the same; a selector that reads tensors is asked layer by layer."""
    counted = CountedDense()
    head = HeadPolicy(counted, counted, KeepAll())
    policy = AttentionPolicy("p", (uniform("all", *[head] * KV_HEADS, layers=3),))
    run(policy, [Life(40, 40, policy.points[0], 0)], lambda: 100)
    assert counted.asked == [1]
    loose = Multiples(3)
    head = HeadPolicy(loose, loose, KeepAll())
    policy = AttentionPolicy("p", (uniform("all", DENSE, head, head, DENSE, layers=3),))
    run(policy, [Life(40, 40, policy.points[0], 0)], lambda: 100)
    assert loose.asked == [[1, 2]] * 3


def test_layers_that_ask_different_things_do_not_share() -> None:
    point = OperatingPoint("all", ((DENSE,) * 4, (SPARSE,) * 4, (DENSE, SPARSE, SPARSE, DENSE)))
    policy = AttentionPolicy("p", (point,))
    for layer in range(3):
        lives = [Life(200, 190, point, 9)]
        (out,) = run(policy, lives, lambda: 80, layer=layer)
        torch.testing.assert_close(out.double(), right_of(lives[0], layer), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("chunk", [TILE, 1000])
def test_dropped_pages_count_through_their_means_where_a_selector_says_so(chunk: int) -> None:
    """A budget of one page leaves the first page and a tile's own; the second head's others count as one key each."""
    length, prompt = 400, 390
    plain, corrected = (BlockSparse(Budget("tokens", 1), corrects=corrects) for corrects in (False, True))
    point = uniform("p", HeadPolicy(plain, plain, KeepAll()), HeadPolicy(corrected, corrected, KeepAll()))
    life = Life(length, prompt, point, 5)
    (out,) = run(AttentionPolicy("p", (point,)), [life], lambda: chunk)
    q, k, v = life.q.double(), life.k.double(), life.v.double()
    for t in range(length):
        own = (t // TILE * TILE if t < prompt else t) // PAGE_SIZE * PAGE_SIZE
        read = [*range(min(PAGE_SIZE, own)), *range(own, t + 1)]
        dropped = range(PAGE_SIZE, own, PAGE_SIZE)
        for head in range(2):
            keys, values, extra = [k[read, head]], [v[read, head]], [torch.zeros(len(read))]
            for first in dropped if head == 1 else ():
                page = slice(first, first + PAGE_SIZE)
                keys.append(k[page, head].mean(0, keepdim=True))
                values.append(v[page, head].mean(0, keepdim=True))
                extra.append(torch.tensor([math.log(PAGE_SIZE)]))
            for query_head in (RATIO * head, RATIO * head + 1):
                logits = torch.cat(keys) @ q[t, query_head] * DIM**-0.5 + torch.cat(extra)
                expected = logits.softmax(0) @ torch.cat(values)
                torch.testing.assert_close(out[t, query_head].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", [300, 100])
def test_a_selector_is_asked_from_its_length_on(prompt: int) -> None:
    """The query block that begins at `above` is the first that is not dense, in a prompt and behind it."""
    sparse = BlockSparse(Budget("tokens", 1), above=2 * TILE)
    outs = []
    for each in (uniform("p", HeadPolicy(sparse, sparse, KeepAll())), uniform("d", DENSE)):
        (out,) = run(AttentionPolicy("p", (each,)), [Life(300, prompt, each, 2)], lambda: 64)
        outs.append(out)
    differ = (outs[0] - outs[1]).abs().amax((1, 2)) > 1e-6
    assert not differ[: 2 * TILE].any() and differ[2 * TILE]
