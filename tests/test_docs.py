"""What the documents say can be checked: the list of settings, the links, the examples."""

import json
import pathlib
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml
from test_policy_commands import POLICY as ALL_BACKENDS

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy_file import load_policy_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("deploy/**/*.md"))]


def fenced(page: pathlib.Path, language: str) -> list[str]:
    """The contents of the page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("script", ["write_configuration.py", "write_policy_schema.py"])
def test_what_is_written_from_the_code_is_current(script: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def anchors(page: pathlib.Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_are_well_formed(page: pathlib.Path) -> None:
    for block in fenced(page, "python"):
        compile(block, str(page), "exec")
    for block in fenced(page, "json"):
        json.loads(block)
    for block in fenced(page, "yaml"):
        assert list(yaml.safe_load_all(block))


def test_policy_examples_are_policies(tmp_path: pathlib.Path) -> None:
    blocks = [block for block in fenced(ROOT / "docs" / "policies.md", "yaml") if "gossamer_policy" in block]
    assert blocks
    for block in blocks:
        file = tmp_path / "policy.yaml"
        file.write_text(block)
        assert load_policy_file(file).policy(Artefacts(file.parent)).points


def test_the_schema_of_policy_files_agrees_with_the_server() -> None:
    """It accepts what is accepted, the short forms included, and refuses what it can see to be wrong."""
    schema = json.loads((ROOT / "docs" / "policy.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid
    texts = [block for block in fenced(ROOT / "docs" / "policies.md", "yaml") if "gossamer_policy" in block]
    texts += [file.read_text() for file in ROOT.glob("configs/policies/*.yaml")] + [ALL_BACKENDS]
    assert [text for text in texts if not valid(yaml.safe_load(text))] == []
    short = ALL_BACKENDS.replace("exact: {}", "exact: {default: {prefill: dense, keep: all}}")
    assert valid(yaml.safe_load(short))
    for old, new in (
        ("layers: 3", "layers: three"),
        ("exact: {}", "Exact: {}"),
        ("exact: {}", "exact: {default: {prefill: sink-recent}}"),
        ("recent: 256}", "recent: 0}"),
        ("columns: 1000", "column: 1000"),
        ("gossamer_policy: 1", "gossamer_policy: 2"),
    ):
        assert old in ALL_BACKENDS and not valid(yaml.safe_load(ALL_BACKENDS.replace(old, new))), new


def test_manifests_are_well_formed() -> None:
    files = [*ROOT.glob("deploy/**/*.yaml")]
    assert files
    for file in files:
        assert all(isinstance(document, dict) for document in yaml.safe_load_all(file.read_text()))
