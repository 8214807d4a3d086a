"""Choosing a candidate for every head: cost, divergence, and what is written of it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy_file import ModelEntry, PolicyFile, Provenance, load_policy_file
from gossamer.attention.policy_view import PHASES, Phase
from gossamer.attention.policy_yaml import to_yaml
from gossamer.attention.profiling.candidates import Candidate, ladder
from gossamer.attention.profiling.cost import CostModel, Goal, Weights
from gossamer.attention.profiling.device import _Pair, _timing
from gossamer.attention.profiling.device_times import (
    Curve,
    DeviceProfile,
    DeviceProfileError,
    PhaseTimes,
    Reads,
    Timing,
    load_device_profile,
    packaged_devices,
    save_device_profile,
)
from gossamer.attention.profiling.fidelity import Score, Trial, within
from gossamer.attention.profiling.findings import Found
from gossamer.attention.profiling.options import DENSE, Assignment, Choice, Options
from gossamer.attention.profiling.search import Plan, Search
from gossamer.attention.profiling.sensitivity import FLOOR, Place, probed_again, sensitivities
from gossamer.attention.profiling.writing import policy_file, spelled
from gossamer.attention.selectors import SinkRecent
from gossamer.kvcache.retention import KeepSinkRecent

LENGTHS = (4096, 32768)
LAYERS, HEADS = 2, 2
LADDERS: dict[Phase, tuple[Candidate, ...]] = {phase: ladder(phase, labels=None, gates=None) for phase in PHASES}
LINE = Curve(points=((0.0, 0.0), (100.0, 100.0)))
TILES = 32  # of a chunk of a prompt, which share its calls


def device(call: float = 0.0, attending: float = 0.0) -> DeviceProfile:
    """A second per page; choosing takes a hundredth of it. Calls of selectors and of attention take so many seconds for
    each query block that shares them in a chunk, and for a token."""

    def times(blocks: int) -> PhaseTimes:
        choose = Timing(call=blocks * call, each=Curve(points=((0.0, 0.0), (100.0, 1.0))))
        return PhaseTimes(
            dense=Timing(call=0.0, each=LINE),
            attend=Timing(call=blocks * attending, each=LINE),
            tokens=Curve(points=((0.0, 0.0), (64.0, 1.5))),
            choose=dict.fromkeys(kinds, choose),
        )

    kinds = {each.kind for own in LADDERS.values() for each in own} - {"dense", "sink-recent"}
    return DeviceProfile(
        device="none",
        dtype="float32",
        ratio=2,
        head_dim=64,
        chunk=64 * TILES,
        about={},
        prefill=times(TILES),
        decode=times(1),
    )


def costs(memory: float | None = None, call: float = 0.0, attending: float = 0.0, goal: Goal = "latency") -> CostModel:
    return CostModel(device(call, attending), Weights.of(goal, memory), LENGTHS, LAYERS, HEADS, 16384)


def found(seed: int) -> dict[Phase, dict[int, Found]]:
    """What reads less is wrong by more, by a different factor for every head."""
    generator = torch.Generator().manual_seed(seed)
    answer: dict[Phase, dict[int, Found]] = {}
    for phase, own in LADDERS.items():
        answer[phase] = {}
        for length in LENGTHS:
            size = (len(own), LAYERS, HEADS)
            density = torch.rand(size, generator=generator, dtype=torch.float64) * 0.9 + 0.01
            for number, candidate in enumerate(own):
                if candidate.window is not None:
                    density[number] = min(1.0, (sum(candidate.window) + 64) / length)
            density[0] = 1.0
            factor = torch.rand(size, generator=generator, dtype=torch.float64)
            error = (1 - density) * factor
            answer[phase][length] = Found(error, 1 - error, density, torch.zeros_like(error), torch.zeros_like(error))
    return answer


def search(
    seed: int,
    memory: float | None = None,
    free: tuple[int, ...] = (0, 1),
    call: float = 0.0,
    attending: float = 0.0,
    fixed: Sequence[tuple[int, int]] = (),
    above: Mapping[Phase, Mapping[str, int]] = MappingProxyType({}),
) -> Search:
    """fixed: layers and heads for which every candidate reads everything, and choosing comes on top."""
    measured = found(seed)
    for table in (own for phase in measured.values() for own in phase.values()):
        for layer, head in fixed:
            table.density[:, layer, head] = 1.0
    weight = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    tables: dict[Phase, list[dict[str, int]]] = {
        phase: [{"mean keys": 256} if "mean" in each.kind else {} for each in own] for phase, own in LADDERS.items()
    }
    model = replace(costs(memory, call, attending), above=above)
    return Search(Options(LADDERS, measured, dict.fromkeys(PHASES, weight), model, tables), free)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.001, 3.0), st.floats(1.0, 4.0))
def test_a_plan_keeps_its_bound_and_a_wider_one_is_hardly_dearer(seed: int, bound: float, more: float) -> None:
    chooser = search(seed)
    plan, wider = chooser.plan(bound), chooser.plan(bound * more)
    assert plan.divergence <= bound * (1 + 1e-9)
    assert wider.cost <= plan.cost + 1 / (LAYERS * HEADS)  # Lagrange's gap: less than what one head costs
    again = chooser.judged(plan.heads)
    assert (again.cost, again.divergence) == pytest.approx((plan.cost, plan.divergence))
    assert search(seed).plan(bound) == plan


def test_a_plan_is_near_the_best_of_all() -> None:
    chooser = search(5)
    options = [options for layer in chooser._options for options in layer]
    few = [own[:: max(1, len(own) // 6)] for own in options]
    for bound in (0.05, 0.2, 0.8):
        best = min(
            sum(each.cost for each in pick)
            for pick in itertools.product(*few)
            if sum(each.divergence for each in pick) <= bound
        )
        assert chooser.plan(bound).cost <= best * 1.02


def selectors(heads: Assignment) -> int:
    """Calls of all layers and phases together."""
    return sum(len({getattr(choice, phase) for choice in row} - {0}) for row in heads for phase in PHASES)


def test_heads_share_a_selector_where_a_call_costs_more_than_it_saves() -> None:
    shared = 0
    for seed in range(6):
        chooser = search(seed, call=80.0)
        plan, apart = chooser.plan(0.4), search(seed).plan(0.4)
        assert plan.divergence <= 0.4
        assert plan.cost <= chooser.judged(apart.heads).cost + 1e-9
        calls = [selectors(each.heads) for each in (plan, apart)]
        shared += calls[0] < calls[1]
    assert shared >= 3


def test_a_call_is_paid_for_by_the_heads_that_share_it() -> None:
    number = next(n for n, each in enumerate(LADDERS["decode"]) if each.kind == "block-sparse mean by mass")
    one, two = Choice(0, number, False), Choice(0, number + 1, False)
    free, dear = search(3), search(3, call=8.0)
    together = [chooser.judged(((one, one), (DENSE, DENSE))).cost for chooser in (free, dear)]
    apart = [chooser.judged(((one, two), (DENSE, DENSE))).cost for chooser in (free, dear)]
    assert apart[1] - apart[0] == pytest.approx(2 * (together[1] - together[0]))


def windows(heads: Assignment) -> int:
    """Calls of attention, over layers."""
    return sum(len({choice if choice.streams else None for choice in row}) for row in heads)


def test_heads_of_a_layer_share_a_window_where_a_call_costs_more_than_it_saves() -> None:
    fewer = 0
    for seed in range(8):
        chooser, free = search(seed, memory=0.6, attending=60.0), search(seed, memory=0.6)
        plan, apart = chooser.plan(0.6), free.plan(0.6)
        assert plan.divergence <= 0.6
        assert plan.cost <= chooser.judged(apart.heads).cost + 1e-9
        fewer += windows(plan.heads) < windows(apart.heads)
    assert fewer >= 3


def test_calls_too_dear_for_anything_leave_every_head_dense() -> None:
    plan = search(2, call=1e4, attending=1e4).plan(1e9)
    assert plan.heads == ((DENSE,) * HEADS,) * LAYERS
    assert plan.cost == pytest.approx(1.0)


def test_what_a_layer_calls_is_paid_for_once_by_all_that_a_step_computes() -> None:
    """Of 4 heads that are half of all; dense attention takes a second a page."""
    by_mass, bounds = "block-sparse mean by mass", "block-sparse bounds by share"
    model = costs(0.0, call=3.0, attending=1.0)
    page = sum(1 / (length / 64) for length in LENGTHS) / 2 / (LAYERS * HEADS)
    assert model.of_calls("decode", [["dense"]]) == 0.0
    assert model.of_calls("decode", [["sink-recent"]]) == pytest.approx(0.5 * page * 1)
    assert model.of_calls("decode", [["dense", by_mass]]) == pytest.approx(0.5 * page * 4)
    assert model.of_calls("decode", [[bounds, by_mass, bounds], ["dense"]]) == pytest.approx(0.5 * page * 10)
    assert model.of_calls("prefill", [["vertical-slash"]]) == pytest.approx(0.5 * page * 2 * 4)  # sees half the pages
    many = costs(0.0, call=3.0, attending=1.0, goal="throughput")
    assert many.of_calls("decode", [[by_mass]]) == pytest.approx(2 / 3 * page * 4 / 16)


def test_up_to_its_least_length_a_candidate_is_dense() -> None:
    """In cost, calls, error and density; the length itself still is."""
    by_mass = "block-sparse mean by mass"
    number = next(n for n, each in enumerate(LADDERS["decode"]) if each.kind == by_mass)
    rows = (((Choice(0, number, False), DENSE), (DENSE, DENSE)), ((DENSE, DENSE), (DENSE, DENSE)))
    always, later, never = (
        search(3, memory=0.0, call=3.0, attending=1.0, above={"decode": {by_mass: above}})
        for above in (4095, 4096, 32768)
    )
    assert later._costs.acts("prefill", by_mass, 1)
    one, dense = (always.judged(heads) for heads in rows)
    assert never.judged(rows[0]) == Plan(rows[0], pytest.approx(dense.cost), 0.0)
    saved = dict.fromkeys(LENGTHS, 0.0)  # of a head, in pages: what it leaves out, less choosing and calls
    for length in LENGTHS:
        density = float(always._found["decode"][length].density[number, 0, 0])
        saved[length] = length / 64 * (1 - density - 0.01) - 3 - 1
    share = 0.5 / 2 / (LAYERS * HEADS)
    assert dense.cost - one.cost == pytest.approx(share * sum(saved[n] / (n / 64) for n in LENGTHS))
    assert dense.cost - later.judged(rows[0]).cost == pytest.approx(share * saved[32768] / (32768 / 64))
    weight = float(always._own._sensitivity["decode"][0, 0])
    assert later.judged(rows[0]).divergence == pytest.approx(
        weight * float(always._found["decode"][32768].error[number, 0, 0])
    )
    plan = later.judged(rows[0])
    assert later.density(plan, "decode", 4096) == 1.0 > later.density(plan, "decode", 32768)


def test_what_a_call_takes_is_told_from_what_its_blocks_add() -> None:
    timing = _timing([(size, _Pair(2.0 + 4 * add, 2.0 + 16 * add, (4, 16))) for size, add in ((8.0, 0.5), (32.0, 1.0))])
    assert timing.call == pytest.approx(2.0)
    assert [timing.each.at(size) for size in (8.0, 20.0, 32.0)] == pytest.approx([0.5, 0.75, 1.0])
    parallel = _timing([(size, _Pair(3.0, 3.0 + size, (4, 16))) for size in (36.0, 72.0)])
    assert parallel.call == 0.0 and parallel.each.at(36.0) == pytest.approx(39 / 16)


def test_a_bound_that_nothing_breaks_gives_the_cheapest_plan() -> None:
    chooser = search(7)
    plan = chooser.plan(1e9)
    assert plan.divergence == pytest.approx(chooser.most)
    assert plan.cost == min(plan.cost, *(chooser.plan(bound).cost for bound in (0.1, 1.0, 2.0)))


def test_a_bound_of_next_to_nothing_gives_dense() -> None:
    plan = search(7).plan(1e-12)
    assert plan.heads == ((DENSE,) * HEADS,) * LAYERS
    assert plan.cost == pytest.approx(1.0)


def test_layers_without_a_choice_stay_dense() -> None:
    plan = search(3, free=(1,)).plan(1e9)
    assert plan.heads[0] == (DENSE,) * HEADS
    assert DENSE not in plan.heads[1]


@pytest.mark.parametrize("bound", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("fixed", [(), ((0, 0),), ((0, 0), (1, 0)), ((0, 0), (0, 1))])
def test_no_head_could_be_changed_for_a_cheaper_plan_within_the_bound(
    bound: float, fixed: tuple[tuple[int, int], ...]
) -> None:
    """Also where the first head of a layer has no choice, or none of a layer's has."""
    chooser = search(3, memory=0.0, fixed=fixed)
    plan, changed = chooser.plan(bound), 0
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        row, options = plan.heads[layer], chooser._options[layer][head]
        assert ((layer, head) in fixed) == (len(options) == 1)
        changed += row[head] != DENSE
        for option in options:
            other = (*row[:head], option.choice, *row[head + 1 :])
            tried = chooser.judged((*plan.heads[:layer], other, *plan.heads[layer + 1 :]))
            assert tried.cost >= plan.cost - 1e-9 or tried.divergence > bound
    assert changed >= (LAYERS * HEADS - len(fixed)) // 2


def test_memory_makes_heads_stream() -> None:
    plan = search(11, memory=0.9).plan(1e9)
    assert all(choice.streams for row in plan.heads for choice in row)
    for row in plan.heads:
        for choice in row:
            assert LADDERS["prefill"][choice.prefill].window == LADDERS["decode"][choice.decode].window
    assert search(11, memory=0.9).memory(plan, 32768) < 0.02
    assert search(11).memory(search(11).judged(((DENSE,) * 2,) * 2), 32768) == 1.0


def test_density_is_what_calibration_found() -> None:
    chooser = search(13)
    plan = chooser.judged(((Choice(3, 0, False), Choice(8, 2, False)), (DENSE, DENSE)))
    table = found(13)["prefill"][4096].density
    expected = (float(table[3, 0, 0]) + float(table[8, 0, 1]) + 2) / 4
    assert chooser.density(plan, "prefill", 4096) == pytest.approx(expected)


def test_what_is_written_is_what_was_chosen(tmp_path: Path) -> None:
    chooser = search(17)
    plans = {
        "balanced": chooser.plan(0.3).heads,
        "fast": search(18, memory=0.8).plan(2.0).heads,
        "exact": ((DENSE,) * 2,) * 2,
    }
    above: dict[Phase, dict[str, int]] = {"prefill": {"vertical-slash": 2048}, "decode": {}}
    model = ModelEntry(name="some", layers=LAYERS, kv_heads=HEADS)
    file = policy_file("some", model, Provenance(source="profiled"), plans, LADDERS, above)
    path = tmp_path / "some.yaml"
    path.write_text(to_yaml(file), "utf-8")
    read = load_policy_file(path)
    assert read == file
    check_entries(read, plans, above)
    assert "  - layers:" in path.read_text("utf-8")
    read.policy(Artefacts(tmp_path))  # no selector reads what a streaming head has released


def check_entries(
    file: PolicyFile, plans: dict[str, tuple[tuple[Choice, ...], ...]], above: dict[Phase, dict[str, int]]
) -> None:
    for point, heads in plans.items():
        entries = file.entries(point)
        for row, choices in zip(entries, heads, strict=True):
            for (entry, _), choice in zip(row, choices, strict=True):
                for phase, number in (("prefill", choice.prefill), ("decode", choice.decode)):
                    candidate = LADDERS["prefill" if phase == "prefill" else "decode"][number]
                    least = above["prefill" if phase == "prefill" else "decode"].get(candidate.kind, 0)
                    expected = candidate.backend.model_copy(update={"above": least} if least else {})
                    assert getattr(entry, phase) == expected
                assert (entry.keep != "all") == choice.streams


def test_streaming_heads_keep_what_they_read(tmp_path: Path) -> None:
    plan = search(11, memory=0.9).plan(1e9)
    model = ModelEntry(layers=LAYERS, kv_heads=HEADS)
    file = policy_file(
        "some", model, Provenance(source="profiled"), {"one": plan.heads}, LADDERS, {p: {} for p in PHASES}
    )
    for row in file.policy(Artefacts(tmp_path)).points[0].heads:
        for head in row:
            assert isinstance(head.keep, KeepSinkRecent)
            assert head.prefill == head.decode == SinkRecent(head.keep.sink, head.keep.recent)


@pytest.mark.parametrize(("numbers", "text"), [([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0, 2-3, 7")])
def test_numbers_are_spelled_as_a_policy_file_has_them(numbers: list[int], text: str) -> None:
    assert spelled(numbers) == text


def test_curves_are_straight_between_points_and_beyond() -> None:
    curve = Curve(points=((0.0, 1.0), (10.0, 2.0), (20.0, 5.0)))
    assert [curve.at(x) for x in (0, 5, 10, 15, 30)] == pytest.approx([1.0, 1.5, 2.0, 3.5, 8.0])
    assert Curve(points=((0.0, 1.0), (1.0, 0.5))).at(10) == 0.0


def test_costs_are_shares_of_dense() -> None:
    model = costs(0.0)
    everything = dict.fromkeys(LENGTHS, Reads(1.0))
    assert 4 * model.of_phase("prefill", "dense", everything) == pytest.approx(0.5)
    half = dict.fromkeys(LENGTHS, Reads(0.5))
    assert 4 * model.of_phase("decode", "sink-recent", half) == pytest.approx(0.25)
    assert 4 * model.of_phase("decode", "block-sparse mean by mass", half) == pytest.approx(0.5 * 0.51)
    singles = dict.fromkeys(LENGTHS, Reads(0.5, 0.5))
    assert 4 * model.of_phase("prefill", "vertical-slash", singles) == pytest.approx(0.5 * (0.5 * 1.5 + 0.01))


def test_a_backend_is_worth_it_from_where_it_costs_less() -> None:
    model = costs()
    assert model.worth_it_above("decode", "block-sparse mean by mass", dict.fromkeys(LENGTHS, Reads(0.1))) == 0
    few = {4096: Reads(0.6), 32768: Reads(0.6)}
    assert model.worth_it_above("decode", "block-sparse mean by mass", few) == 4096
    assert Weights.of("memory").memory == 0.8
    weights = Weights.of("throughput", 0.4)
    assert (weights.prefill, weights.decode, weights.memory) == pytest.approx((0.2, 0.4, 0.4))


def test_a_device_profile_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    save_device_profile(device(), path)
    assert load_device_profile(path) == device()
    with pytest.raises(DeviceProfileError, match="does not say how long learned-gate"):
        device().seconds("prefill", "learned-gate by share", seen=10, reads=Reads(0.5))
    path.write_text("{}", "utf-8")
    with pytest.raises(DeviceProfileError, match=r"leave --device-profile out\.$"):
        load_device_profile(path)
    with pytest.raises(DeviceProfileError):
        load_device_profile(tmp_path / "none.json")


def test_packaged_device_profiles_know_every_candidate() -> None:
    kinds = {phase: {each.kind for each in ladder(phase, labels="l", gates="g")} for phase in PHASES}
    assert packaged_devices()
    for name in packaged_devices():
        profile = load_device_profile(Path(name))
        for phase, own in kinds.items():
            for kind in own:
                assert profile.seconds(phase, kind, seen=512, reads=Reads(0.5)) > 0
            dense = profile.seconds(phase, "dense", seen=512, reads=Reads(1.0))
            assert profile.seconds(phase, "dense", seen=128, reads=Reads(1.0)) < dense


def test_sensitivity_is_divergence_per_error_and_never_nothing() -> None:
    probe: dict[Phase, int] = {"prefill": 2, "decode": 2}
    own = {phase: table[4096] for phase, table in found(3).items()}
    own["prefill"].error[2] = torch.tensor([[0.5, 0.1], [0.2, 0.0]], dtype=torch.float64)
    nats = {("prefill", 0, 0): 1.0, ("prefill", 0, 1): 0.4}
    asked = list[Place]()

    def diverged(tried: Sequence[Assignment], phase: Phase) -> list[float]:
        asked.extend(alone(heads, phase) for heads in tried)
        return [nats.get(alone(heads, phase), 0.0) for heads in tried]

    answer: dict[Phase, Tensor] = sensitivities(diverged, (2, 2), (0, 1), probe, own)
    assert len(set(asked)) == len(asked) == 8
    floor = FLOOR * 1.4 / 0.8
    expected = torch.tensor([[2.0, 4.0], [floor, floor]], dtype=torch.float64)
    torch.testing.assert_close(answer["prefill"], expected)
    assert float(answer["decode"].abs().sum()) == 0.0


def alone(heads: Assignment, phase: Phase) -> Place:
    """The only head of an assignment that is not dense, and that in this phase alone."""
    ((layer, head),) = [
        (n, m) for n, row in enumerate(heads) for m, choice in enumerate(row) if choice != Choice(0, 0, False)
    ]
    assert heads[layer][head] == (Choice(2, 0, False) if phase == "prefill" else Choice(0, 2, False))
    return phase, layer, head


def test_heads_that_look_further_in_longer_prompts_are_probed_there_too() -> None:
    """One that lost nothing before, and one that lost a little; not one that loses twice as much, and no layer without
    a choice. What was known is never made less."""
    probe: dict[Phase, int] = {"prefill": 2, "decode": 2}
    near, far = ({phase: table[4096] for phase, table in found(3).items()} for _ in range(2))
    for table, errors in ((near, [[0.0, 0.1], [0.2, 0.0]]), (far, [[0.02, 0.2], [0.8, 0.3]])):
        for phase in PHASES:
            table[phase].error[2] = torch.tensor(errors, dtype=torch.float64)
    known = {phase: torch.tensor([[0.3, 4.0], [2.0, 0.0]], dtype=torch.float64) for phase in PHASES}
    asked = list[Place]()

    def diverged(tried: Sequence[Assignment], phase: Phase) -> list[float]:
        asked.extend(alone(heads, phase) for heads in tried)
        return [{(0, 0): 0.5, (1, 0): 0.8}[alone(heads, phase)[1:]] for heads in tried]

    answer = probed_again(known, diverged, probe, near, far)
    assert sorted(asked) == sorted((phase, layer, 0) for phase in PHASES for layer in (0, 1))
    for phase in PHASES:
        torch.testing.assert_close(answer[phase], torch.tensor([[25.0, 4.0], [2.0, 0.0]], dtype=torch.float64))
        assert known[phase][0, 0] == 0.3


def trial(*cells: tuple[str, int, int, int]) -> Trial:
    """(task, length, found, asked) each, one answer per score."""
    return Trial(
        tuple(Score(task, length, 0.0, 1.0, int(n < right), 1) for task, length, right, of in cells for n in range(of)),
        {},
    )


@pytest.mark.parametrize(
    ("points", "own", "held"),
    [
        (1.0, (12, 12, 12), True),
        (1.0, (11, 12, 12), True),  # a single answer is more than a point, and may be chance
        (1.0, (10, 12, 12), False),
        (1.0, (11, 11, 12), False),  # two of the same length are not
        (1.0, (11, 12, 11), True),  # ... of different ones are
        (20.0, (10, 12, 12), True),
        (20.0, (9, 12, 12), False),
        (9.0, (11, 11, 12), True),
        (9.0, (10, 12, 12), False),
    ],
)
def test_a_single_answer_is_no_loss(points: float, own: tuple[int, int, int], held: bool) -> None:
    places = (("pairs", 4096), ("multikey", 4096), ("pairs", 32768))
    dense = trial(*((task, length, 12, 12) for task, length in places))
    found = trial(*((task, length, right, 12) for (task, length), right in zip(places, own, strict=True)))
    assert within(dense, found, points) is held
    assert within(dense, dense, 0.0)


def test_many_answers_are_held_to_their_points() -> None:
    dense = trial(("pairs", 4096, 300, 400), ("text", 4096, 0, 0))
    assert within(dense, trial(("pairs", 4096, 296, 400)), 1.0)
    assert not within(dense, trial(("pairs", 4096, 295, 400)), 1.0)
    assert within(dense, trial(("pairs", 4096, 350, 400)), 0.0)
