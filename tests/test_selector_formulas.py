"""Selectors against their definitions, written out with loops."""

import random
from dataclasses import replace

import pytest
import torch
from kernel_cases import make_case
from mass_cases import make_mass_case
from selector_cases import GATE_DIM, gate
from torch import Tensor

from gossamer.attention.index import build_index
from gossamer.attention.selectors import BlockSparse, Budget, Proposal, VerticalSlash
from gossamer.kernels.layout import NULL_PAGE, PAGE_SIZE, PagedKV, QueryBlocks
from gossamer.kernels.probe import probe_mass
from gossamer.kernels.rotary import Rotary
from gossamer.kernels.score_pages import page_mass
from gossamer.kvcache.summaries import FilledPages, MeanKeys

SPANS = ((900, 100), (0, 190), (640, 70))


def past_pages(kv: PagedKV, blocks: QueryBlocks, n: int) -> list[int]:
    row = blocks.rows[n]
    origin = row.pos // blocks.size * blocks.size
    return [page for page in range(origin // PAGE_SIZE) if kv.table[row.seq, page] != NULL_PAGE]


def masses(kv: PagedKV, blocks: QueryBlocks, seed: int = 3) -> Tensor:
    """Any masses that add up to 1, with ties and zeros."""
    rng = random.Random(seed)
    mass = torch.zeros(kv.heads.numel(), len(blocks), kv.table.shape[1])
    for g in range(mass.shape[0]):
        for n in range(mass.shape[1]):
            for page in past_pages(kv, blocks, n):
                mass[g, n, page] = rng.choice([0.0, 1.0, 1.0, 2.0, 5.0, 9.0])
    return mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)


@pytest.mark.parametrize("tile", [32, 128, 1])
@pytest.mark.parametrize(
    "budget",
    [
        Budget("tokens", 64),
        Budget("tokens", 500),
        Budget("share", 0.3),
        Budget("share", 1.0),
        Budget("tokens", 64, recent=100),
        Budget("tokens", 500, recent=100),
        Budget("share", 0.3, recent=64),
    ],
)
def test_a_count_is_what_is_read_in_all(tile: int, budget: Budget) -> None:
    """The first page, the block's own and the recent ones belong to it; what is read beside them has the most mass."""
    case = make_mass_case(SPANS, tile=tile)
    kv, blocks = case.kv, case.blocks
    mass = masses(kv, blocks)
    index = build_index(Proposal(budget.pages(mass, kv, blocks)), kv, blocks)
    for g in range(mass.shape[0]):
        for n, row in enumerate(blocks.rows):
            start, count = int(index.start[g, n]), int(index.count[g, n])
            read = set(index.pages[start : start + count].tolist())
            past = past_pages(kv, blocks, n)
            seen = (row.pos + row.count - 1) // PAGE_SIZE + 1
            own = seen - row.pos // blocks.size * blocks.size // PAGE_SIZE
            wanted = -(-int(budget.value) // PAGE_SIZE) if budget.kind == "tokens" else -(-seen * budget.value // 1)
            origin = row.pos // blocks.size * blocks.size // PAGE_SIZE
            always = {page for page in past if page >= origin - -(-budget.recent // PAGE_SIZE)} | set(past[:1])
            assert always <= read
            assert len(read) == min(seen, max(int(wanted), own + len(always)))
            left = [float(mass[g, n, page]) for page in past if page not in read]
            taken = [float(mass[g, n, page]) for page in past if page in read and page not in always]
            assert not left or not taken or max(left) <= min(taken)


@pytest.mark.parametrize("kind", ["mass", "part", "weight"])
def test_recent_pages_are_read_beside_a_mass(kind: str) -> None:
    case = make_mass_case(SPANS, tile=32)
    mass = masses(case.kv, case.blocks)
    alone, near = (Budget(kind, 0.5, recent=recent).pages(mass, case.kv, case.blocks) for recent in (0, 130))  # type: ignore[arg-type]
    for n, row in enumerate(case.blocks.rows):
        first = row.pos // 32 * 32 // PAGE_SIZE
        recent = {page for page in past_pages(case.kv, case.blocks, n) if page >= first - 3}
        for g in range(mass.shape[0]):
            expected = set(alone[g, n].nonzero().flatten().tolist()) | recent
            assert set(near[g, n].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("least", [0, 300])
def test_mass_and_part(least: int) -> None:
    case = make_mass_case(SPANS, tile=32)
    kv, blocks = case.kv, case.blocks
    mass = masses(kv, blocks)
    for kind, value in (("mass", 0.5), ("mass", 0.99), ("part", 0.4), ("part", 1.0), ("weight", 0.05)):
        chosen = Budget(kind, value, least).pages(mass, kv, blocks)  # type: ignore[arg-type]
        for g in range(mass.shape[0]):
            for n, row in enumerate(blocks.rows):
                past = past_pages(kv, blocks, n)
                read = [page for page in past if chosen[g, n, page]]
                weights = sorted((float(mass[g, n, page]) for page in past), reverse=True)
                if kind == "part":
                    enough = [w for w in weights if w > 0 and w >= value * weights[0]]
                elif kind == "weight":
                    enough = [w for w in weights if w >= value]
                else:
                    enough, need = [], value * sum(weights)
                    for w in weights:  # whole ties are taken
                        if sum(enough) >= need and w < enough[-1]:
                            break
                        enough.append(w)
                    enough = [w for w in enough if w > 0]
                own = (row.pos + row.count - 1) // PAGE_SIZE - row.pos // blocks.size * blocks.size // PAGE_SIZE + 1
                floor = max(0, min(len(past), -(-least // PAGE_SIZE) - own))
                assert len(read) >= max(len(enough), floor)
                if least == 0:
                    assert sorted((float(mass[g, n, p]) for p in read), reverse=True) == pytest.approx(enough)


@pytest.mark.parametrize(
    ("kind", "value"), [("tokens", 0), ("tokens", 1.5), ("share", 0.0), ("mass", 1.2), ("part", -1.0)]
)
def test_budgets_that_mean_nothing(kind: str, value: float) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget(kind, value)  # type: ignore[arg-type]


def test_columns_and_diagonals() -> None:
    """Every page that a chosen distance leads some query of the block to, and the chosen columns, and no others."""
    case = make_case(SPANS, tile=32, heads=(1, 0))
    kv, blocks = case.kv, case.blocks
    selector = VerticalSlash(9, 7, probe=20)
    proposal = selector.propose(case.q, kv, blocks, case.scale)
    columns, diagonals = probe_mass(case.q, kv, blocks, 20, scale=case.scale)
    assert proposal.tokens is not None
    for g in range(2):
        for n, row in enumerate(blocks.rows):
            assert proposal.tokens[g, n].tolist() == sorted(columns[g, row.seq].topk(9).indices.tolist())
            distances = diagonals[g, row.seq].topk(7).indices.tolist()
            keys = [at - o for at in range(row.pos, row.pos + row.count) for o in distances if at >= o]
            assert proposal.pages[g, n].nonzero().flatten().tolist() == sorted({key // PAGE_SIZE for key in keys})


def test_adaptive_sizes_hold_the_mass() -> None:
    case = make_case(SPANS, tile=32)
    proposal = VerticalSlash(10**6, 0, probe=30, mass=0.7).propose(case.q, case.kv, case.blocks, case.scale)
    columns, _ = probe_mass(case.q, case.kv, case.blocks, 30, scale=case.scale)
    assert proposal.tokens is not None
    for g in range(2):
        for n, row in enumerate(case.blocks.rows):
            held = sorted(
                (float(columns[g, row.seq, t]) for t in proposal.tokens[g, n].tolist() if t >= 0), reverse=True
            )
            assert sum(held) >= 0.7 - 1e-5 and sum(held[:-1]) < 0.7


def turned(x: Tensor, position: int, inv_freq: Tensor, sign: float = 1.0) -> Tensor:
    """RoPE, a pair of dimensions at a time, in float64."""
    out, half = x.double().clone(), inv_freq.numel()
    for i in range(half):
        angle = torch.tensor(sign * position * float(inv_freq[i]), dtype=torch.float64)
        low, high = x[i].double(), x[i + half].double()
        out[i] = low * angle.cos() - high * angle.sin()
        out[i + half] = high * angle.cos() + low * angle.sin()
    return out


def test_rotary_turns_and_turns_back() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.1]), 1.25)
    x = torch.randn(3, 6)
    position = torch.tensor([0, 7, 5000])
    there = rotary.turn(x, position)
    for row in range(3):
        expected = turned(x[row], int(position[row]), rotary.inv_freq)
        expected[:4] *= 1.25
        torch.testing.assert_close(there[row].double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(rotary.turn(there, position, back=True), x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("phase", "own_keys"), [("prefill", False), ("prefill", True), ("decode", False)])
def test_a_gate_is_its_formula(phase: str, own_keys: bool) -> None:
    """SeerAttention, for one block: pooled keys of each page, the block's mean query, both before RoPE, projected,
    rotated at block and page starts, softmax over the past pages."""
    heads, ratio, dim, length = 2, 2, 16, 330
    tile = 32 if phase == "prefill" else 1
    case = make_case(
        ((length - 5, 5),) if tile > 1 else ((length - 1, 1),), tile=tile, ratio=ratio, heads=(0, 1), dim=dim
    )
    kv, blocks = case.kv, case.blocks
    selector = gate(phase, heads, ratio, dim, Budget("tokens", 64), own_keys=own_keys)
    keys, rotary, own = selector.keys, selector.keys.rotary, selector.keys.turned
    per_page = keys.weight.shape[1]
    table = torch.full((heads, kv.k.shape[1], per_page, GATE_DIM), float("nan"))
    view = PagedKV(kv.k, kv.v, kv.table, kv.length, kv.heads, kv.sink, kv.window, kv.ratio, {keys.name: table})
    keys.write(view, FilledPages.of([(0, page) for page in range(length // PAGE_SIZE)], "cpu"))
    pages_of = {
        count: replace(selector, budget=Budget("tokens", count * PAGE_SIZE)).propose(case.q, view, blocks, case.scale)
        for count in range(2, 6)
    }
    for n, row in enumerate(blocks.rows):
        pages = past_pages(kv, blocks, n)
        for g in range(heads):
            gate_keys = []
            for page in pages:
                places = range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                plain = torch.stack([turned(case.keys[0][at, g], at, rotary.inv_freq, -1.0) for at in places])
                pooled = torch.cat((plain.amax(0), plain.amin(0), plain.mean(0)))
                projected = [pooled @ weight.double() for weight in keys.weight[g]]
                gate_keys.append(torch.stack([turned(key, page * PAGE_SIZE, own.inv_freq) for key in projected]))
            rows = []
            for i in range(row.count):
                group = case.q[row.token + i, g * ratio : (g + 1) * ratio]
                rows.append(torch.cat([turned(q, row.pos + i, rotary.inv_freq, -1.0) for q in group]))
            plain_q = torch.stack(rows).mean(0)
            shares = []
            for j in range(selector.query.shape[1]):
                asked = plain_q @ selector.query[g, j].double()
                if selector.norm is not None:
                    asked = asked / (asked.pow(2).mean() + 1e-6).sqrt()
                asked = turned(asked, row.pos // tile * tile, own.inv_freq)
                of_pages = torch.stack(gate_keys)[:, j % per_page]
                shares.append((of_pages @ asked * GATE_DIM**-0.5).softmax(0))
            mass = torch.stack(shares).amax(0)
            mass[0] = 2.0  # the first page is always read and counts
            own_pages = (row.pos + row.count - 1) // PAGE_SIZE - row.pos // tile * tile // PAGE_SIZE + 1
            for count, proposal in pages_of.items():
                best = mass.topk(min(len(pages), max(0, count - own_pages))).indices.tolist()
                assert proposal.pages[g, n].nonzero().flatten().tolist() == sorted(pages[i] for i in best)


def test_mean_keys_are_those_of_full_pages() -> None:
    """Block-sparse reads what the masses of the true means say."""
    case = make_case(SPANS, tile=32)
    table = torch.full((2, case.kv.k.shape[1], 64), float("nan"))
    kv = case.kv
    view = PagedKV(kv.k, kv.v, kv.table, kv.length, kv.heads, kv.sink, kv.window, kv.ratio, {MeanKeys().name: table})
    full = [(seq, page) for seq, span in enumerate(SPANS) for page in range(sum(span) // PAGE_SIZE)]
    MeanKeys().write(view, FilledPages.of(full, "cpu"))
    for seq, page in full:
        expected = case.keys[seq][page * PAGE_SIZE : (page + 1) * PAGE_SIZE].mean(0)
        torch.testing.assert_close(table[:, kv.table[seq, page]].double(), expected, atol=1e-5, rtol=1e-4)
    budget = Budget("mass", 0.8)
    proposal = BlockSparse(budget).propose(case.q, view, case.blocks, case.scale)
    mass = page_mass(case.q, view, case.blocks, table, scale=case.scale)
    assert torch.equal(proposal.pages, budget.pages(mass, view, case.blocks))
