"""`qlora-recipes compare RUN RUN ... --margin POINTS`: compare evaluated runs and write a report.

Loads no model unless asked to measure KL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_recipes.api import MARGIN, compare
from qlora_recipes.commands.flags import RUNS, Parser
from qlora_recipes.commands.recipe_cli import without_secrets
from qlora_recipes.errors import UsageError, nearest
from qlora_recipes.fields import Field

if TYPE_CHECKING:
    from qlora_recipes.comparison.findings import Report

_MARGIN_HELP = "largest difference, in points, still counted as equivalent (default: 1.0)"
_IS_MARGIN: dict[str, Any] = dict(valid=lambda points: 0 < points < 100, expected="points above 0, such as 1.0")
MARGIN_FLAG = Field("margin", "float", _MARGIN_HELP, "POINTS", MARGIN, **_IS_MARGIN)
_ABOUT = """Say whether runs that differ in precision alone score alike, and write index.html, report.md and \
report.json, with every picture as SVG and every table as CSV and LaTeX beside them. With two precisions the 16-bit \
run is the baseline; with more, the first one listed is. Runs with several seeds are paired by seed. Controls and \
divergences that are in the run folders are reported with them."""
_FLAGS = (
    MARGIN_FLAG,
    Field("tasks", "list[str]", "tasks to compare (default: all that are evaluated)", "TASK", None),
    Field("baseline", "str", "what the others are compared with", "PRECISION", None),
    Field("report_to", "list[str]", "trackers that get the verdict too, such as tensorboard", "TRACKER", ()),
    Field("output", "str", "where the report goes (default: report/ beside the runs)", "FOLDER", None),
    Field("other_spread", "bool", "compare runs that were spread over processes in different ways", default=False),
    Field("divergence", "bool", "load every arm in turn and measure KL as well", default=False),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: when the runs differ in more than precision, are not evaluated, or say too little.
    """
    given = Parser("qlora-recipes compare", _ABOUT, {"flags": _FLAGS}, words=RUNS).parse(argv)
    folders = [Path(run) for run in given["run"]]
    beside = os.path.commonpath([Path(os.path.realpath(folder)).parent for folder in folders])  # a loop of links too
    output = Path(given["output"] or Path(beside, "report"))
    report = compare(
        *folders,
        margin=given["margin"],
        output=output,
        tasks=given["tasks"],
        baseline=given["baseline"],
        divergence=given["divergence"],
        other_spread=given["other_spread"],
        command=called(),
    )
    say(report, output)
    track(report, given["report_to"], output.parent)


def called() -> list[str]:
    """Return the command line of this process, as files may hold it."""
    return without_secrets([Path(sys.argv[0]).name, *sys.argv[1:]])


def say(report: Report, folder: Path) -> None:
    """Print the verdicts and where the report is."""
    from qlora_recipes.report.page import HTML, MARKDOWN

    if report.limit is not None:
        print(f"NOT A RESULT: the evaluation was limited to {report.limit} documents per task")
    if report.exploratory:
        print(f"Exploratory: {'; '.join(report.exploratory)}.")
    for contrast in report.contrasts:
        print(contrast.sentence)
    print(f"report: {folder / HTML} (and {MARKDOWN} beside it)")


def track(report: Report, trackers: Sequence[str], folder: Path) -> None:
    """Give the verdict of every arm to trackers, through accelerate; what they keep in files goes into `folder`.

    Raises:
        UsageError: for a tracker that accelerate does not know or that is not installed.
    """
    if not trackers:
        return
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind.value) for kind in LoggerType if kind != LoggerType.ALL]
    installed = [str(kind.value) for kind in get_available_trackers()]
    for tracker in trackers:
        if tracker not in known:
            raise UsageError(f"--report_to: no tracker {tracker!r}.{nearest(tracker, known)} Known: {', '.join(known)}")
        if tracker not in installed:
            raise UsageError(f"--report_to {tracker}: it is not installed. Run: pip install {tracker}")
    accelerator = Accelerator(log_with=list(trackers), project_dir=folder, cpu=True)
    accelerator.init_trackers("verdicts")
    for contrast in report.contrasts:
        low, high = contrast.overall.interval_95
        figures = {"difference": contrast.overall.difference, "low_95": low, "high_95": high}
        named = {f"verdict/{contrast.name}/{name}": value for name, value in figures.items()}
        accelerator.log({**named, f"verdict/{contrast.name}": contrast.sentence})
    accelerator.end_training()
