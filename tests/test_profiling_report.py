"""The report of a finished profile: its numbers where they belong, its doubts said, its page whole."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from profile_cases import ASKED, BALANCED, FAST, LENGTHS, profile, trial

from gossamer.attention.profiling.profile import Attempt, GateRecall, Profile, Spent
from gossamer.attention.profiling.report import as_html, make_report, write_report
from gossamer.attention.profiling.report_charts import Mark, linear, logarithmic, scatter, staircase
from gossamer.attention.profiling.report_parts import Gallery, Section, Table
from gossamer.attention.profiling.report_rivals import compared
from gossamer.attention.profiling.report_text import as_markdown
from gossamer.attention.profiling.report_verdicts import Answers, Loss, verdicts_of

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: elements that are closed in order, attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open = self.open[:-1] if tag not in VOID else self.open

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def page_of(made: Profile) -> Page:
    return Page(as_html(make_report(made)))


def section(made: Profile, anchor: str) -> Section:
    return next(each for each in make_report(made).sections if each.anchor == anchor)


def tables(made: Profile, anchor: str) -> list[Table]:
    return [part for part in section(made, anchor).parts if isinstance(part, Table)]


def row(table: Table, first: str) -> dict[str, str]:
    """A table's row by its first cell; of columns that have one name the last counts."""
    return dict(zip(table.columns, next(row for row in table.rows if row[0] == first), strict=True))


def test_files_are_written_beside_what_they_are_of(tmp_path: Path) -> None:
    made = profile()
    assert write_report(made, tmp_path) == (tmp_path / "tiny.html", tmp_path / "tiny.md")
    assert write_report(made, tmp_path / "llama-3.1.yaml") == (tmp_path / "llama-3.1.html", tmp_path / "llama-3.1.md")
    assert write_report(made, tmp_path / "llama-3.1") == (tmp_path / "llama-3.1.html", tmp_path / "llama-3.1.md")
    assert (tmp_path / "tiny.html").read_text("utf-8") == (tmp_path / "llama-3.1.html").read_text("utf-8")
    assert (tmp_path / "tiny.md").read_text("utf-8").startswith("# Attention profile of tiny\n")


def test_the_overview_has_the_profiles_numbers() -> None:
    made = profile()
    report = make_report(made)
    balanced = row(report.overview, "balanced")
    assert balanced["cost of dense, predicted"] == "43.1%"
    assert balanced["prefill density at 2048"] == balanced["decode density at 2048"] == "31.4%"
    assert balanced["KV memory at 2048"] == "61.7%"
    assert balanced["nats from dense, unseen"] == "0.0123"
    assert balanced["answers: in it, of all"] == f"{ASKED} of {4 * ASKED}"
    fast = row(report.overview, "fast")
    assert fast["worst task loss, points [95%]"].startswith("2.5 [")  # 30 of 40 under dense, 29 here
    assert fast["worst task loss, points [95%]"].endswith(", pairs at 1024 tokens")
    shown = [each[: len(report.overview.rows[0])] for each in page_of(made).rows]
    assert list(report.overview.rows[0]) in shown
    assert report.subtitle.endswith("the default operating point is balanced")


def test_an_interval_is_wilsons() -> None:
    assert Answers(0, 10).interval == pytest.approx((0.0, 0.2775), abs=5e-4)  # as in the tables of Brown et al. 2001
    assert Answers(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-4)  # Newcombe 1998
    low, high = Loss("", Answers(56, 70), Answers(48, 80)).interval  # the difference of Newcombe's second paper
    assert (low / 100, high / 100) == pytest.approx((0.0524, 0.3339), abs=5e-4)


def test_a_bound_that_does_not_hold_is_said() -> None:
    made = profile(unseen={"fast": trial(0.2, pairs=10), "balanced": trial(0.0199)})
    by_name = {each.point.name: each for each in verdicts_of(made)}
    assert by_name["fast"].standing == "not held"
    said = " ".join(by_name["fast"].said)
    assert "The bound held in the search, but not on unseen documents" in said
    assert "0.2000 nats from dense, where 0.1 are allowed" in said
    assert "pairs at 1024 tokens (and 1 more) lost 50.0 points (10 of 40 right, 30 under dense)" in said
    assert "by chance" not in said
    report = make_report(made)
    assert report.headline.startswith("Not held on unseen documents: fast;")
    assert (1, 1) in report.overview.marked
    assert row(report.overview, "fast")["nats from dense, unseen"] == "0.2000"
    assert row(report.overview, "fast")["worst task loss, points [95%]"].startswith("50.0 [")
    assert "**not held**" in as_markdown(report)
    assert ("td", "class", " marked") in page_of(made).attributes


def test_a_bound_that_broke_in_the_search_only_is_said() -> None:
    made = profile()
    balanced = replace(made.points[1], searched=trial(0.03))
    said = verdicts_of(replace(made, points=(made.points[0], balanced, made.points[2])))[0].said
    assert said[0].startswith("The bound holds on unseen documents, but did not in the search: 0.0300 nats")


def test_an_unknown_divergence_does_not_hold() -> None:
    found = verdicts_of(profile(unseen={"balanced": trial(float("nan"))}))[0]
    assert found.standing == "not held"
    assert "unknown nats" in found.said[0]


def test_a_loss_within_chance_is_said_to_be() -> None:
    found = verdicts_of(profile(unseen={"fast": trial(0.05, pairs=27)}))[1]  # 7.5 points of 4
    assert found.standing == "not held, few answers"
    assert "where 4 may be lost, which so few answers can do by chance" in found.said[0]


def test_too_few_answers_are_said() -> None:
    made = profile()
    balanced = verdicts_of(made)[0]
    assert balanced.standing == "held, few answers"
    assert "4 of 4 results rest on too few answers to tell a loss within 1 point from a larger one: up to 18.6" in (
        " ".join(balanced.said)
    )
    wide = replace(made.points[1], bound=replace(BALANCED, points=20.0))
    assert verdicts_of(replace(made, points=(made.points[0], wide)))[0].standing == "held"


def test_a_point_that_is_dense_is_said() -> None:
    made = profile()
    dense = replace(made.points[1], plan=made.points[0].plan)
    said = verdicts_of(replace(made, points=(made.points[0], dense)))[0].said
    assert said[0].startswith("Every head is dense here")


def test_doubts_come_from_the_numbers() -> None:
    made = profile(2, 2, windows=(1,))
    weak = trial(0.0, single=4)
    points = (replace(made.points[0], unseen=weak), *(replace(each, unseen=weak) for each in made.points[1:]))
    made = replace(made, points=points, gates={"prefill": gates(0.5, 0.6)}, device=replace_device(made))
    text = " ".join(make_report(made).doubts)
    assert "single at 1024 (10.0% (4 of 40))" in text
    assert "judged by 2 documents" in text
    assert "4 query heads per KV head of 32 channels in bfloat16, but this model has 2 query" in text
    assert "1 layer of 2 have a sliding window" in text
    assert "The learned gate of prefill finds no more than pooled keys" in text
    assert "block-sparse (score bounds) (decode) diverged less" not in text  # the point itself is nearer now
    assert "add up to" not in text


def replace_device(made: Profile) -> "Profile.device":  # type: ignore[name-defined]
    return made.device.model_copy(update={"ratio": 4})


def test_tables_that_do_not_belong_together_are_doubted() -> None:
    made = profile()
    plan = replace(made.points[1].plan, divergence=1.5)
    made = replace(made, points=(made.points[0], replace(made.points[1], plan=plan), made.points[2]))
    assert any("balanced: the predictions of its heads add up to" in each for each in make_report(made).doubts)


def test_rivals_are_judged_at_equal_density() -> None:
    made = profile()
    assert [each.by_density for each in compared(made)] == ["won", "lost", "neither"]
    assert [each.by_cost for each in compared(made)] == ["neither", "lost", "lost"]
    less = replace(made.rivals[0], density=0.2)  # diverges more, but reads less
    assert [each.by_density for each in compared(replace(made, rivals=(less,)))] == ["neither"]
    said = section(made, "rivals").said[0]
    assert "Of 3 comparisons, per-head choice won 1 and lost 1 at equal density" in said
    assert "at equal predicted cost it won 0 and lost 2." in said
    (table,) = tables(made, "rivals")
    assert table.rows[0][-1] == f"{4 * ASKED + 4} of {4 * ASKED + 4}"
    assert section(replace(made, rivals=()), "rivals").said == ("No comparison was asked for.",)


def test_worst_heads_are_those_with_most_predicted_divergence() -> None:
    made = profile(3, 2, windows=(0,))
    (table,) = tables(made, "worst")
    heads = {}
    for layer, head in ((layer, head) for layer in (1, 2) for head in (0, 1)):
        choice = made.points[1].plan.heads[layer][head]
        errors = {
            phase: max(made.found[phase][n].error[getattr(choice, phase), layer, head] for n in LENGTHS)
            for phase in made.found
        }
        heads[f"{layer}.{head}"] = sum(float(made.sensitivity[p][layer, head] * e) for p, e in errors.items())
    assert list(dict.fromkeys(row[0] for row in table.rows)) == sorted(heads, key=lambda head: -heads[head])
    assert sum(heads.values()) == pytest.approx(made.points[1].plan.divergence)


def test_alphas_are_ranked_against_far_mass() -> None:
    made = profile(2, 2)
    far = made.looks[LENGTHS[-1]].far
    said = " ".join(section(replace(made, alphas=far * 0.5), "streaming").said)
    assert "Spearman correlation of 1.00: they agree. Of the half that would stream by its alphas, 100.0% would" in said
    assert "correlation of -1.00: they do not agree" in " ".join(
        section(replace(made, alphas=1 - far), "streaming").said
    )
    assert "cannot be compared" in " ".join(section(replace(made, alphas=torch.ones(2, 2)), "streaming").said)
    assert "No alphas were trained" in " ".join(section(made, "streaming").said)
    one = profile(1, 1)
    assert "cannot be compared" in " ".join(section(replace(one, alphas=torch.ones(1, 1)), "streaming").said)
    window = profile(3, 2, windows=(1,))  # its layer has no alphas
    alphas = window.looks[LENGTHS[-1]].far.clone()
    alphas[1] = torch.nan
    assert "rank 4 heads with a Spearman correlation of 1.00" in " ".join(
        section(replace(window, alphas=alphas), "streaming").said
    )


def gates(gate: float, pooled: float) -> GateRecall:
    """The same for each of the two layers' two heads."""
    return GateRecall(torch.full((2, 2), gate), torch.full((2, 2), pooled))


def test_gates_stand_beside_pooled_keys() -> None:
    """In the heads that have a choice, which are those of the second layer."""
    made = replace(profile(windows=(0,)), gates={"prefill": gates(0.81, 0.7), "decode": gates(0.5, 0.62)})
    made.gates["decode"].gate[0] = 1.0  # type: ignore[index]
    table, maps = section(made, "gates").parts
    assert isinstance(table, Table) and isinstance(maps, Gallery)
    assert table.rows == (
        ("prefill", "81.0%", "70.0%", "better", "2 of 2", "0"),
        ("decode", "50.0%", "62.0%", "not better", "0 of 2", "2"),
    )
    assert ">11.0<" in maps.pictures[0].svg and ">-12.0<" in maps.pictures[1].svg
    prefill, decode = section(made, "gates").said[1:]
    assert prefill == "prefill: 2 heads find more, by 11.0 points in the mean and 11.0 in head 1.0."
    assert "2 heads find less, by 12.0 points" in decode and "Of the 2 heads that gain less" in decode


@pytest.mark.parametrize(
    ("pages", "near", "reason"),
    [
        (0.6, 0.9, "2 need more than 50.0% of the pages for 90% of"),
        (0.1, 0.6, "2 have more than 50.0% of it at the beginning or near"),
        (0.1, 0.1, "2 have something to find that pooled keys find as well"),
    ],
)
def test_why_a_gate_finds_nothing_more_is_said(pages: float, near: float, reason: str) -> None:
    made = profile(windows=(0,))
    length, count = max(LENGTHS), 10
    sink, last, held = (torch.full((2, 2), count * each, dtype=torch.float64) for each in (near / 2, near / 2, pages))
    looks = replace(made.looks[length], queries=torch.tensor([count]), sink=sink, near=last, pages=held)
    made = replace(made, looks={**made.looks, length: looks}, gates={"prefill": gates(0.5, 0.5)})
    assert (
        f"prefill: no head gains or loses a point. Of the 2 heads that gain less than a point, {reason}"
        in (section(made, "gates").said[1])
    )
    assert reason in " ".join(make_report(made).doubts)


def test_time_is_shared_out_over_heads_and_tokens() -> None:
    made = replace(profile(), spent=(Spent("calibration at 1024 tokens", 12.288, 2**30),))
    (table,) = tables(made, "stages")
    # three tasks, of two documents each, and four heads
    assert table.rows[0] == ("calibration at 1024 tokens", "12.3 s", "1.00 GiB", "0.5 ms")


def test_all_attempts_are_in_the_chart() -> None:
    made = profile()
    attempts = tuple(
        Attempt("fast", 0.1, replace(made.points[2].plan, cost=0.3 + n / 100), 0.01 * n, 2.0, n % 2 > 0)
        for n in range(7)
    )
    page = as_html(make_report(replace(made, attempts=attempts)))
    for n in range(7):
        assert page.count(f"tried for fast: {30 + n}.0% of dense") == 3  # one for each chart


def test_a_page_needs_nothing_else() -> None:
    page = page_of(profile())
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & page.tags
    assert {"svg", "style", "table", "details"} <= page.tags
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "src"
        assert name not in ("href", "action") or value.startswith("#"), value
    text = as_html(make_report(profile()))
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    anchors = {value for tag, name, value in page.attributes if (tag, name) == ("section", "id")}
    assert {value[1:] for _, name, value in page.attributes if name == "href"} == anchors


HOSTILE = '<script>alert("1")</script> & <img src=http://x.test onerror=go()>|`*_[x](http://x.test)\n# title'


def test_hostile_names_are_text() -> None:
    made = profile(name=HOSTILE)
    rivals = (replace(made.rivals[0], name=HOSTILE),)
    made = replace(made, about={HOSTILE: HOSTILE}, rivals=rivals, spent=(Spent(HOSTILE, 1.0, 1),))
    page = page_of(made)
    assert not {"script", "img"} & page.tags
    assert not any(name.startswith("on") or name == "src" for _, name, _ in page.attributes)
    assert '<script>alert("1")</script>' in page.text
    text = as_markdown(make_report(made))
    assert "<script" not in text.replace("\\<", "")
    assert "[x](" not in text.replace("\\[", "")
    assert "\n# title" not in text


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize("name", ["tiny", HOSTILE])
def test_tables_of_the_summary_are_whole(name: str) -> None:
    made = replace(profile(name=name), alphas=torch.rand(2, 2), gates={"prefill": gates(0.8, 0.7)})
    text = as_markdown(make_report(made))
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert len(blocks) > 10
    for block in blocks:
        lines = block.splitlines()
        assert len({columns(line) for line in lines}) == 1, lines[0]
        assert re.fullmatch(r"\|( -+:? \|)+", lines[1])
        assert text[text.index(block) - 2 :].startswith("\n\n")


def test_the_summary_has_head_maps_in_letters() -> None:
    made = profile(2, 3)
    assert "layer 0   S~  B   B     S~  B   B\n" in as_markdown(make_report(made))


@pytest.mark.parametrize(("layers", "kv_heads", "most"), [(1, 1, 200_000), (80, 8, 2_000_000)])
def test_small_and_large_models_render(layers: int, kv_heads: int, most: int) -> None:
    made = profile(layers, kv_heads)
    text = as_html(make_report(made))
    assert len(text) < most
    Page(text)
    assert re.search(r"\b(nan|inf|None)\b", text) is None
    assert text.count('class="cells"') > 10


def test_a_profile_of_one_length_and_no_sparse_point_renders() -> None:
    made = profile()
    settings = replace(made.settings, lengths=(1024,), bounds=(), compare=False)
    one = replace(
        made.points[0],
        unseen=trial(0.0, lengths=(1024,)),
        searched=trial(0.0, lengths=(1024,)),
        density={phase: {1024: 1.0} for phase in made.found},
        memory={1024: 1.0},
    )
    found = {phase: {1024: own[1024]} for phase, own in made.found.items()}
    looks = {1024: made.looks[1024]}
    file = made.file.model_copy(update={"points": {"exact": made.file.points["exact"]}})
    bare = replace(
        made, settings=settings, points=(one,), found=found, looks=looks, file=file, attempts=(), rivals=(), spent=()
    )
    report = make_report(bare)
    assert report.headline == "No operating point beside dense was asked for."
    Page(as_html(report))
    assert "No head is predicted to lead away from dense." in as_markdown(report)


def test_axes_hold_their_values() -> None:
    for values in ([0.0], [3.0], [0.001, 0.5, 99.0], [1.0, 100.0], [-5.0, 2.0], []):
        axis = linear("x", values)
        assert all(-1e-9 <= axis.at(value) <= 1 + 1e-9 for value in values)
        assert 2 <= len(axis.ticks) <= 9
    for values in ([0.0], [1e-7, 3.0], [0.02], []):
        axis = logarithmic("x", values)
        assert all(0 <= axis.at(value) <= 1 + 1e-9 for value in values)
    assert logarithmic("x", [1e-3, 1.0]).at(1e-2) < logarithmic("x", [1e-3, 1.0]).at(1e-1)


def test_what_is_not_finite_is_left_out_of_charts() -> None:
    axis = linear("x", [0.0, 1.0, float("nan"), float("inf")])
    drawn = scatter("", axis, axis, [Mark(0.5, float("nan"), "a"), Mark(0.5, 0.5, "a", label="<b>", title="<i>")])
    assert drawn.count('class="mark') == 1
    assert "nan" not in drawn
    assert "&lt;b&gt;" in drawn
    assert "&lt;i&gt;" in drawn
    assert "<i>" not in drawn


def test_the_edge_of_a_cloud() -> None:
    assert staircase([(2, 2), (1, 5), (3, 3), (4, 1)]) == ((1, 5), (2, 5), (2, 2), (4, 2), (4, 1))


def test_bounds_stand_where_they_were_asked_for() -> None:
    pairs = dict(tables(profile(), "provenance")[1].rows)
    assert pairs["bound of fast"] == f"{FAST.points:g} points of any task, 0.1 nats"
    assert pairs["bound of balanced"] == "1 point of any task, 0.02 nats"
    assert pairs["seeds of documents for verification"] == "2000 to 2001"
