"""`python eval/benchmark.py RECIPE --precisions nf4 bf16`: train, evaluate, compare, report; again to go on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from qlora_recipes.commands.compare import MARGIN, compare_folders, points, say
from qlora_recipes.comparison.report import check_report_folder, write_report
from qlora_recipes.errors import UsageError
from qlora_recipes.experiments.benchmark.plan import Plan, plan_benchmark, record_margin
from qlora_recipes.experiments.benchmark.training import train_missing
from qlora_recipes.run.signals import Stopped, StopSignals

_DESCRIPTION = """Train every precision with every seed, evaluate them from disk, compare, and write a report. What is \
finished is kept: interrupted, the same command goes on. Any flag of the recipe can follow and goes to every arm. The \
baseline is the 16-bit precision of two, and the first of more."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"benchmark: {message}. --help lists the flags")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for anything a user can mend; what is finished by then is kept.
        Stopped: when SIGTERM or SIGINT came; a training that runs has saved its step by then.
    """
    given, flags = _parser().parse_known_args(list(arguments))
    plan = plan_benchmark(
        Path(given.recipe),
        precisions=given.precisions,
        seeds=given.seeds,
        margin=given.margin,
        tasks=given.tasks,
        limit=given.limit,
        demo=given.demo,
        flags=flags,
        output=Path(given.output) if given.output else None,
    )
    try:
        with StopSignals():
            run(plan, launch=given.launch.split() if given.launch is not None else None, controls=not given.no_controls)
    except Stopped as stopped:
        trained = sum(arm.folder.finished for arm in plan.arms)
        print(
            f"stopped by {stopped.signal.name}: {trained} of {len(plan.arms)} runs are trained; the same command goes "
            f"on, and keeps what is finished in {plan.output}",
            file=sys.stderr,
        )
        raise


def run(plan: Plan, *, launch: Sequence[str] | None = None, controls: bool = True) -> None:
    """Do what of a plan is not done yet, and write the report."""
    console = Console(stderr=True)
    page_folder = plan.output / "report"
    check_report_folder(page_folder)
    if plan.tasks:
        from qlora_recipes.experiments.benchmark.scoring import check_tasks

        check_tasks(plan)
    earlier_margins = record_margin(plan)
    train_missing(plan, console, launch=launch)
    from qlora_recipes.experiments.benchmark.scoring import (  # torch: not while others train
        measure_divergence,
        score_missing,
    )

    tasks = score_missing(plan, console, controls=controls)
    measure_divergence(plan, console)
    report = compare_folders(
        [arm.folder.path for arm in plan.arms],
        plan.margin,
        tasks=tasks,
        baseline=plan.baseline,
        earlier_margins=earlier_margins,
    )
    say(report, write_report(report, page_folder))


def _parser() -> _Parser:
    parser = _Parser(
        prog="benchmark.py",
        usage="%(prog)s RECIPE --precisions P P [P ...] [--flag value ...]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    flags: dict[str, dict[str, Any]] = {
        "--precisions": dict(nargs="+", required=True, metavar="P", help="two or more of nf4, bf16, fp16, int8, fp4"),
        "--seeds": dict(
            nargs="+", type=_whole, default=[0], metavar="N", help="one run of every arm each (default: 0)"
        ),
        "--demo": dict(action="store_true", help="stand-in model, bundled rows and offline tasks"),
        "--tasks": dict(nargs="+", metavar="TASK", help="as `qlora-recipes evaluate` takes them"),
        "--margin": dict(type=points, default=MARGIN, metavar="POINTS", help="largest difference that is none (1.0)"),
        "--output": dict(metavar="FOLDER", help="default: runs/<recipe>/benchmark"),
        "--limit": dict(type=_count, metavar="N", help="only N documents of each task: a trial, which is no result"),
        "--launch": dict(metavar="WORDS", help='train through accelerate launch, such as --launch "--num_processes 2"'),
        "--no_controls": dict(action="store_true", help="leave out the bases before tuning and the exchanged adapters"),
    }
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's file, such as recipes/llama2_guanaco.py")
    for name, options in flags.items():
        parser.add_argument(name, **options)
    return parser


def _whole(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"got {word!r}, expected a whole number")
    return int(word)


def _count(word: str) -> int:
    if _whole(word) < 2:
        raise argparse.ArgumentTypeError(f"got {word!r}, expected 2 documents or more")
    return int(word)
