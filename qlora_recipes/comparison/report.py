"""A comparison as files: `index.html`, `report.md` and `report.json`, from one record and nothing else.

The HTML file is self-contained: its plots are inline, it runs no script and loads nothing. Text from models and data is
escaped by the template engine, and invisible characters are shown as symbols. Knows nothing of statistics.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from qlora_recipes.comparison.escape import markdown, plain
from qlora_recipes.comparison.findings import Report
from qlora_recipes.comparison.plots import error_plot, forest_plot, loss_plot
from qlora_recipes.comparison.sentences import interval, signed
from qlora_recipes.errors import RunFolderError
from qlora_recipes.run.files import read_record, write_text

JSON, MARKDOWN, HTML = "report.json", "report.md", "index.html"


def write_report(report: Report, folder: Path) -> Path:
    """Write all three forms, each whole or not at all, and return the path of the HTML.

    Raises:
        RunFolderError: when something other than a report is in the folder.
    """
    check_report_folder(folder)
    forms = {JSON: render_json(report), MARKDOWN: render_markdown(report), HTML: render_html(report)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in forms.items():
        write_text(folder / name, text)
    return folder / HTML


def check_report_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier report."""
    others = [] if not folder.exists() else [f.name for f in folder.iterdir()] if folder.is_dir() else [folder.name]
    if strange := sorted(name for name in others if name not in (JSON, MARKDOWN, HTML) and not name.startswith(".")):
        raise RunFolderError(f"{folder} holds {strange[0]}, which is no report. Give --output another folder")


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


def render_html(report: Report) -> str:
    """Return one self-contained page."""
    environment = _environment(autoescape=True, finalize=_visible)
    css = Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))
    plots = {"forest": forest_plot(report), "losses": loss_plot(report.losses), "errors": error_plot(report)}
    return environment.get_template("report.html.jinja").render(report=report, css=css, **plots)


def render_markdown(report: Report) -> str:
    """Return the same as Markdown, without the plots."""
    return _environment(autoescape=False, finalize=markdown).get_template("report.md.jinja").render(report=report)


@cache
def _environment(*, autoescape: bool, finalize: Callable[[Any], Any]) -> Environment:
    loader = PackageLoader("qlora_recipes.comparison", ".")
    environment = Environment(loader=loader, autoescape=autoescape, finalize=finalize)
    environment.filters.update(signed=signed, interval=interval, number="{:g}".format, p=_p_value, size=_size)
    return environment


def _visible(value: Any) -> Any:
    """Markup passes; in anything else invisible characters become symbols, and Jinja escapes the rest."""
    return value if isinstance(value, Markup) else plain(value)


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number / 1024:,.0f} KiB"
