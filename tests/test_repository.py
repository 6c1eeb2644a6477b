"""The files that a repository is expected to have: they match their schemas, and their links and versions are right."""

from __future__ import annotations

import ast
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


def test_every_frequent_error_is_quoted_as_the_package_prints_it() -> None:
    """What stands between the dots is constant: a text of the source, or the name of a check."""
    quoted = re.findall(r"^```text\n(.+?)\n```$", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.M | re.S)
    nodes = [
        node
        for file in (ROOT / "qlora_recipes").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    said = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    said += [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    assert len(quoted) > 15
    for message in quoted:
        for part in message.split("..."):
            assert any(part.strip() in text for text in said), f"docs/errors.md quotes {part!r}"


WITHOUT_A_PAGE = {
    *("gemma3_faq", "gpt_oss_reasoning", "llama2_preferences", "llama3_no_robots"),
    *("mistral_ultrachat", "qwen3_reasoning", "qwen3_tools", "smollm3_smoltalk"),
}
"""Recipes whose benchmark was not run yet: `.venv/bin/python docs/gallery.py NAME` makes their pages."""


def test_every_recipe_is_in_the_gallery_as_it_is() -> None:
    gallery = ROOT / "docs" / "gallery"
    recipes = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "recipes").glob("*.py")}
    assert {page.stem for page in gallery.glob("*.md")} == set(recipes) - WITHOUT_A_PAGE
    for page in gallery.glob("*.md"):
        assert f"```python\n{recipes[page.stem]}```\n" in page.read_text(encoding="utf-8")
    pictures = list(gallery.glob("*.png"))
    assert len(pictures) == 2 * len(recipes.keys() - WITHOUT_A_PAGE)
    assert max(picture.stat().st_size for picture in pictures) < 300 * 1024
