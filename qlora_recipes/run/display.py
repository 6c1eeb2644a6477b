"""What several rooms show a person in the same way: what is being done, a progress bar, a table, a smoothed curve.

Knows nothing of what is shown.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_STARTED = time.monotonic()


def say(doing: str, console: Console) -> None:
    """Print what is being done from now on, after the seconds since the program began."""
    console.print(Text(f"{time.monotonic() - _STARTED:6.1f} s  {doing}", style="dim"))


def progress_bar(name: str, console: Console, *columns: progress.ProgressColumn) -> progress.Progress:
    """Return a bar with a name, a count, columns of its own and the time left; nothing is drawn but on a terminal."""
    return progress.Progress(
        progress.TextColumn(escape(name)),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        *columns,
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def figures_table(figures: Mapping[str, str]) -> Table:
    """Return a table of one line a figure, its name before it; a figure without text is left out."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, figure in figures.items():
        if figure:
            table.add_row(name, Text(figure, overflow="fold"))
    return table


def running_mean(values: Sequence[float], share: int) -> list[float]:
    """Average each value with those before it, over one `share`-th of all."""
    window = max(1, len(values) // share)
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
