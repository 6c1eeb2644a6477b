"""`qlora-recipes compare RUN RUN ... --margin POINTS`: compare evaluated runs and write a report.

Loads no model unless asked to measure KL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_recipes.commands.flags import RUNS, Parser
from qlora_recipes.commands.recipe_cli import without_secrets
from qlora_recipes.errors import ComparisonError
from qlora_recipes.fields import Field

if TYPE_CHECKING:
    from qlora_recipes.comparison.findings import Report

MARGIN = 1.0
"""Points. The spread of a leaderboard score from the order of its answers alone is about as large."""

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
    Field("output", "str", "where the report goes (default: report/ beside the runs)", "FOLDER", None),
    Field("divergence", "bool", "load every arm in turn and measure KL as well", default=False),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: when the runs differ in more than precision, are not evaluated, or say too little.
    """
    given = Parser("qlora-recipes compare", _ABOUT, {"flags": _FLAGS}, words=RUNS).parse(argv)
    from qlora_recipes.comparison.report import check_report_folder, read_report, write_report

    folders = [Path(run) for run in given["run"]]
    beside = os.path.commonpath([folder.resolve().parent for folder in folders])
    output = Path(given["output"] or Path(beside, "report"))
    check_report_folder(output)
    if given["divergence"]:
        _measure_divergence(folders, given["baseline"])
    margin, earlier = given["margin"], read_report(output)
    margins = [*earlier.earlier_margins, earlier.margin] if earlier else []
    if margins[-1:] == [margin]:
        margins.pop()
    report = compare_folders(folders, margin, tasks=given["tasks"], baseline=given["baseline"], earlier_margins=margins)
    say(report, write_report(report, output))


def compare_folders(
    folders: Sequence[Path],
    margin: float,
    *,
    tasks: Sequence[str] | None = None,
    baseline: str | None = None,
    earlier_margins: Sequence[float] = (),
) -> Report:
    """Return the report of run folders; it tells the margins that earlier reports on them stated."""
    from qlora_recipes.comparison.build import build_report, choose_baseline  # scipy: not while flags are read
    from qlora_recipes.comparison.controls import read_controls
    from qlora_recipes.comparison.evaluated import group, read_scores

    arms = group([read_scores(folder, tasks) for folder in folders])
    if baseline is not None and baseline not in arms:
        raise ComparisonError(f"no run has the precision {baseline}, expected as baseline; got {', '.join(arms)}")
    baseline = baseline or choose_baseline(list(arms))
    arms = {baseline: arms[baseline], **arms}  # the baseline first
    command = without_secrets([Path(sys.argv[0]).name, *sys.argv[1:]])
    return build_report(
        arms, margin=margin, controls=read_controls(arms), earlier_margins=earlier_margins, command=command
    )


def say(report: Report, page: Path) -> None:
    """Print the verdicts and where the report is."""
    from qlora_recipes.comparison.report import MARKDOWN

    if report.limit is not None:
        print(f"NOT A RESULT: the evaluation was limited to {report.limit} documents per task")
    for contrast in report.contrasts:
        print(contrast.sentence)
    print(f"report: {page} (and {MARKDOWN} beside it)")


def _measure_divergence(folders: Sequence[Path], baseline: str | None) -> None:
    from qlora_recipes.comparison.build import choose_baseline
    from qlora_recipes.comparison.evaluated import group, read_scores
    from qlora_recipes.evaluation.kl import measure  # torch, which reading files can do without

    arms = group([read_scores(folder) for folder in folders])
    name = baseline or choose_baseline(list(arms))
    reference, *seeds = [run.folder for run in arms[name].values()]
    others = [next(iter(by_seed.values())).folder for precision, by_seed in arms.items() if precision != name]
    measure(reference, [*others, *seeds[:1]], said=print)
