"""A comparison as files, from one record and nothing else: `index.html`, `report.md` and `report.json`.

Beside them are every picture as SVG in `figures/` and every table as CSV and LaTeX in `tables/`.

The HTML file is self-contained: its pictures are inline, it runs no script and loads nothing. Text from models and data
is escaped by the template engine, and invisible characters are shown as symbols. Knows nothing of statistics.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from qlora_recipes.comparison.findings import ChangedAnswer, Report
from qlora_recipes.comparison.sentences import interval, signed
from qlora_recipes.errors import RunFolderError
from qlora_recipes.report.escape import markdown, visible
from qlora_recipes.report.plots import PICTURES, Picture, pictures
from qlora_recipes.report.tables import TABLES, as_csv, as_latex, tables
from qlora_recipes.run.files import read_record, write_text

JSON, MARKDOWN, HTML = "report.json", "report.md", "index.html"
KNOWN = {
    Path(): {JSON, MARKDOWN, HTML, "figures", "tables"},
    Path("figures"): {f"{name}.svg" for name in PICTURES},
    Path("tables"): {f"{name}{end}" for name in TABLES for end in (".csv", ".tex")},
}
"""Folder to what a report may put there."""
SHOWN = 5
"""Changed answers of a contrast that are not folded."""


def write_report(report: Report, folder: Path) -> Path:
    """Write every form, each file whole or not at all, and return the path of the HTML.

    What an earlier report has left there, and this one has nothing for, is removed.

    Raises:
        RunFolderError: when something other than a report is in the folder.
    """
    check_report_folder(folder)
    drawn = pictures(report)
    files = {Path("figures", f"{name}.svg"): picture.svg for name, picture in drawn.items()}
    for name, table in tables(report).items():
        files |= {Path("tables", f"{name}.csv"): as_csv(table), Path("tables", f"{name}.tex"): as_latex(table)}
    page = render_html(report, drawn)
    files |= {Path(MARKDOWN): render_markdown(report), Path(HTML): page, Path(JSON): render_json(report)}
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / file, text)
    for place in ("figures", "tables"):
        for name in KNOWN[Path(place)]:
            if Path(place, name) not in files:
                (folder / place / name).unlink(missing_ok=True)
    return folder / HTML


def check_report_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier report."""
    for place, known in KNOWN.items():
        there = folder / place
        others = [] if not there.exists() else [f.name for f in there.iterdir()] if there.is_dir() else [there.name]
        if strange := sorted(name for name in others if name not in known and not name.startswith(".")):
            raise RunFolderError(f"{there} holds {strange[0]}, which is no report. Give --output another folder")


def read_report(folder: Path) -> Report | None:
    """Return the report in a folder, or None where there is none.

    Raises:
        RunFolderError: when it is damaged or of another schema; it says which margins were given before.
    """
    try:
        return read_record(folder / JSON, Report, fix="Remove it or give --output another folder")
    except FileNotFoundError:
        return None


def render_json(report: Report) -> str:
    """Return the record as JSON; every number is finite."""
    return json.dumps(asdict(report), indent=1, allow_nan=False) + "\n"  # ASCII: a lone surrogate has no UTF-8


def render_html(report: Report, drawn: Mapping[str, Picture] | None = None) -> str:
    """Return one self-contained page, with the report's pictures where they are drawn already."""
    environment = _environment(autoescape=True, finalize=visible)
    css = Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))
    page = environment.get_template("report.html.jinja")
    return page.render(report=report, css=css, pictures=drawn or pictures(report), tables=tables(report), shown=SHOWN)


def render_markdown(report: Report) -> str:
    """Return the same as Markdown, without the pictures."""
    page = _environment(autoescape=False, finalize=markdown).get_template("report.md.jinja")
    return page.render(report=report, tables=tables(report))


@cache
def _environment(*, autoescape: bool, finalize: Callable[[Any], Any]) -> Environment:
    loader = PackageLoader("qlora_recipes.report", ".")
    environment = Environment(loader=loader, autoescape=autoescape, finalize=finalize)
    environment.filters.update(signed=signed, interval=interval, number="{:g}".format, day=_day, in_turn=_in_turn)
    return environment


def _day(moment: str) -> str:
    """Return day and minute of an ISO 8601 time in UTC."""
    return moment[:16].replace("T", " ")


def _in_turn(changed: Sequence[ChangedAnswer]) -> list[ChangedAnswer]:
    """Return the answers with every kind of change among the first ones."""
    kinds = [[one for one in changed if one.change == kind] for kind in dict.fromkeys(each.change for each in changed)]
    return [one for turn in zip_longest(*kinds) for one in turn if one is not None]
