"""What the documents say can be checked: the list of settings, the links, the examples."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from gossamer.attention.policy_file import load_policy_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("deploy/**/*.md"))]


def fenced(page: pathlib.Path, language: str) -> list[str]:
    """The contents of the page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_list_of_settings_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "write_configuration.py"), "--check"]
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
        assert load_policy_file(file).policy().points


def test_manifests_are_well_formed() -> None:
    files = [*ROOT.glob("deploy/**/*.yaml")]
    assert files
    for file in files:
        assert all(isinstance(document, dict) for document in yaml.safe_load_all(file.read_text()))
