"""A finished profile as one page that needs nothing else, and as a summary in Markdown. docs/profile-report.md says how
to read them."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from gossamer.attention.profiling.profile import Profile
from gossamer.attention.profiling.report_doubts import doubts
from gossamer.attention.profiling.report_gates import gates_section
from gossamer.attention.profiling.report_heads import heads_section, maps_section, worst_section
from gossamer.attention.profiling.report_maps import head_map
from gossamer.attention.profiling.report_origins import origins_section, stages_section
from gossamer.attention.profiling.report_parts import (
    Gallery,
    HeadMap,
    Section,
    Table,
    default_point,
    listed,
    number_of,
)
from gossamer.attention.profiling.report_results import (
    cost_section,
    density_section,
    kind_of,
    tasks_section,
    verdict_table,
)
from gossamer.attention.profiling.report_rivals import rivals_section
from gossamer.attention.profiling.report_streaming import streaming_section
from gossamer.attention.profiling.report_text import as_markdown
from gossamer.attention.profiling.report_verdicts import Verdict, headline, verdicts_of

ENDINGS = (".html", ".md", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Report:
    """All that a page and a text show. kinds: by operating point, the class of its colour."""

    title: str
    subtitle: str
    headline: str
    verdicts: tuple[Verdict, ...]
    overview: Table
    doubts: tuple[str, ...]
    sections: tuple[Section, ...]
    kinds: dict[str, str]


def write_report(profile: Profile, folder_or_path: Path) -> tuple[Path, Path]:
    """Write the page and the summary into a folder, under the policy's name, or beside a path, which may have the
    ending .html, .md or that of the policy file. Returns both paths. Raises OSError."""
    if folder_or_path.is_dir():
        base = folder_or_path / profile.file.name
    else:
        whole = folder_or_path.suffix in ENDINGS
        base = folder_or_path.with_suffix("") if whole else folder_or_path
    page, text = (base.with_name(base.name + ending) for ending in (".html", ".md"))
    report = make_report(profile)
    page.write_text(as_html(report), "utf-8")
    text.write_text(as_markdown(report), "utf-8")
    return page, text


def make_report(profile: Profile) -> Report:
    """Every number in it is the profile's."""
    verdicts, model = verdicts_of(profile), profile.model
    shape, name = profile.shape, profile.model.name or profile.file.name
    subtitle = (
        f"{f'{model.model_type}, ' if model.model_type else ''}{number_of(shape.layers, 'layer')} of "
        f"{number_of(shape.kv_heads, 'KV head')}; "
        f"profiled at {listed(map(str, profile.settings.lengths))} tokens for {profile.settings.goal}; the default "
        f"operating point is {default_point(profile).name}"
    )
    sections = (
        tasks_section(profile),
        cost_section(profile),
        density_section(profile),
        maps_section(profile),
        heads_section(profile),
        rivals_section(profile),
        worst_section(profile),
        streaming_section(profile),
        gates_section(profile),
        stages_section(profile),
        origins_section(profile),
    )
    return Report(
        f"Attention profile of {name}",
        subtitle,
        headline(verdicts),
        tuple(verdicts),
        verdict_table(profile, verdicts),
        tuple(doubts(profile)),
        sections,
        {point.name: kind_of(profile, point.name) for point in profile.points},
    )


def as_html(report: Report) -> str:
    """Everything that is not a picture of ours is escaped."""
    source = (files("gossamer") / "attention" / "profiling" / "report.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.tests["gallery"] = lambda part: isinstance(part, Gallery)
    environment.tests["headmap"] = lambda part: isinstance(part, HeadMap)
    page: str = environment.from_string(source).render(report=report, head_map=head_map)
    return page
