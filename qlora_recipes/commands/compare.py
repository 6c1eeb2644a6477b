"""`qlora-recipes compare RUN RUN ... --margin POINTS`: hold evaluated runs against each other and write a report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qlora_recipes.comparison.build import build_report, choose_baseline
from qlora_recipes.comparison.controls import read_controls
from qlora_recipes.comparison.evaluated import group, read_scores
from qlora_recipes.comparison.findings import Report
from qlora_recipes.comparison.report import MARKDOWN, check_report_folder, read_report, write_report
from qlora_recipes.errors import ComparisonError, UsageError

MARGIN = 1.0
"""Points. The spread that a leaderboard score has from the order of its answers alone is about as large."""

_DESCRIPTION = """Say whether runs that differ in precision alone score alike, and write index.html, report.md and \
report.json. Of two runs the 16-bit one is the baseline, of more precisions the first. Runs with several seeds are \
paired by seed. Controls and divergences that lie in the run folders are reported with them."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"compare: {message}. qlora-recipes compare --help lists the flags")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: when the runs differ in more than precision, are not evaluated, or say too little.
    """
    given = _parser().parse_args(list(arguments))
    folders = [Path(run) for run in given.run]
    output = Path(given.output) if given.output else _beside(folders) / "report"
    check_report_folder(output)
    if given.divergence:
        _measure_divergence(folders, given.baseline)
    report = compare_folders(folders, given.margin, tasks=given.tasks, baseline=given.baseline, output=output)
    say(report, write_report(report, output))


def compare_folders(
    folders: Sequence[Path],
    margin: float,
    *,
    tasks: Sequence[str] | None = None,
    baseline: str | None = None,
    earlier_margins: Sequence[float] | None = None,
    output: Path | None = None,
) -> Report:
    """Return the report of run folders. Margins that an earlier report in `output` stated are told in the new one."""
    runs = [read_scores(folder, tasks) for folder in folders]
    arms = group(runs)
    if baseline is not None and baseline not in arms:
        raise ComparisonError(f"no run has the precision {baseline}, expected as baseline; got {', '.join(arms)}")
    baseline = baseline or choose_baseline(list(arms))
    if earlier_margins is None:
        earlier_margins = _earlier_margins(output, margin) if output else []
    controls = read_controls(runs, baseline)
    return build_report(runs, margin=margin, baseline=baseline, controls=controls, earlier_margins=earlier_margins)


def _earlier_margins(output: Path, margin: float) -> list[float]:
    earlier = read_report(output)
    if earlier is None:
        return []
    margins = [*earlier.earlier_margins, earlier.margin]
    return margins[:-1] if earlier.margin == margin else margins


def say(report: Report, page: Path) -> None:
    """Print the verdicts and where the report is."""
    if report.limit is not None:
        print(f"NOT A RESULT: the evaluation was limited to {report.limit} documents per task")
    for contrast in report.contrasts:
        print(contrast.sentence)
    print(f"report: {page} (and {MARKDOWN} beside it)")


def _beside(folders: Sequence[Path]) -> Path:
    """Return the folder that the runs lie in."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def _measure_divergence(folders: Sequence[Path], baseline: str | None) -> None:
    from qlora_recipes.evaluation.kl import measure  # torch, which reading files can do without

    arms = group([read_scores(folder) for folder in folders])
    name = baseline or choose_baseline(list(arms))
    reference, *seeds = [run.folder for run in arms[name].values()]
    others = [next(iter(by_seed.values())).folder for precision, by_seed in arms.items() if precision != name]
    measure(reference, [*others, *seeds[:1]], said=print)


def _parser() -> _Parser:
    parser = _Parser(prog="qlora-recipes compare", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", nargs="+", metavar="RUN", help="run folders, such as runs/falcon_faq/nf4-seed0")
    parser.add_argument(
        "--margin", type=points, default=MARGIN, metavar="POINTS", help="largest difference that is none (default: 1.0)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to compare (default: all that are evaluated)")
    parser.add_argument("--baseline", metavar="PRECISION", help="what the others are held against")
    parser.add_argument("--output", metavar="FOLDER", help="where the report goes (default: report/ beside the runs)")
    parser.add_argument("--divergence", action="store_true", help="load every arm in turn and measure KL as well")
    return parser


def points(word: str) -> float:
    """Return a margin in points."""
    try:
        margin = float(word)
    except ValueError:
        margin = 0.0
    if not 0 < margin < 100:
        raise argparse.ArgumentTypeError(f"got {word!r}, expected points above 0, such as 1.0")
    return margin
