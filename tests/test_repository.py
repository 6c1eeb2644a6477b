"""The files that a repository is expected to have: they match their schemas, and their links and versions are right."""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "recipes" / "README.md"]


@pytest.mark.parametrize(
    ("schema", "file"),
    [("vendor.github-workflows", ".github/workflows/test.yml"), ("vendor.citation-file-format", "CITATION.cff")],
)
def test_the_file_matches_its_schema(schema: str, file: str) -> None:
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / file)]
    checked = subprocess.run(words, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_workflow_runs_what_people_run_on_the_pythons_that_are_pinned() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make lint", "make test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_the_citation_is_of_this_version() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == config["metadata"]["version"]
    assert citation["license"] == config["metadata"]["license_expression"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^(```.*?^```|    .*?$)", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_site_builds_and_every_page_is_in_it(tmp_path: Path) -> None:
    """Strict: a page that is left out of the navigation, or a link between pages that leads nowhere, fails it."""
    pytest.importorskip("mkdocs", reason="needs the docs extra: make docs")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(ROOT / "mkdocs.yml")]
    built = subprocess.run([*words, "--site-dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "Invalid recipes are rejected" in (tmp_path / "api.html").read_text(encoding="utf-8")
