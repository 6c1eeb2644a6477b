"""The checks as a table of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_recipes.run.receipt import Check

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "off": "dim"}


def print_checks(checks: Sequence[Check], title: str, console: Console) -> None:
    """Print one line a check, with the advice beneath what is not a pass."""
    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=None, show_header=False, padding=(0, 1, 0, 0)
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.verdict, style=_STYLES[check.verdict]), Text(check.name), _words(check))
    console.print(table)
    console.print(Text(tally(checks)))


def _words(check: Check) -> Text:
    words = Text(check.figure)
    if check.advice and check.verdict != "pass":
        words.append(f"\n{check.advice}", style="italic")
    return words


def tally(checks: Sequence[Check]) -> str:
    """Return how many checks have each verdict, such as `31 pass, 2 warn (steps, memory)`."""
    parts = []
    for verdict in _STYLES:
        names = [check.name for check in checks if check.verdict == verdict]
        if names:
            parts.append(f"{len(names)} {verdict}" + (f" ({', '.join(names)})" if verdict != "pass" else ""))
    return ", ".join(parts)
