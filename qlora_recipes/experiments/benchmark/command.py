"""`qlora-recipes benchmark RECIPE --precisions nf4 bf16`: train, evaluate, compare, report; again to resume.

Holds no model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qlora_recipes.commands.compare import MARGIN_FLAG, called, say, track
from qlora_recipes.commands.flags import count
from qlora_recipes.commands.recipe_cli import parse_with_recipe
from qlora_recipes.evaluation.task_loading import load_tasks
from qlora_recipes.experiments.benchmark import scoring
from qlora_recipes.experiments.benchmark.jobs import Engine, SideBySide
from qlora_recipes.experiments.benchmark.plan import Plan, describe, plan_benchmark, preregister
from qlora_recipes.experiments.benchmark.power import power_of
from qlora_recipes.experiments.benchmark.slurm import Slurm, read_options
from qlora_recipes.experiments.benchmark.training import train_missing
from qlora_recipes.fields import Field
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.run.signals import Stopped, StopSignals

_ABOUT = """Train every precision with every seed, evaluate them from disk, compare, and write a report. What is \
finished is kept: the same command resumes an interrupted benchmark. With two precisions the 16-bit run is the \
baseline; with more, the first one listed is."""
_LAUNCH = 'train through accelerate launch, with its own flags: --launch "--num_processes 2"'
_FLAGS = (
    Field("precisions", "list[str]", f"two or more of {', '.join(PRECISIONS)}", "P", ()),
    Field("seeds", "list[int]", "one run of every arm each (default: 0)", "N", (0,)),
    Field("demo", "bool", "stand-in model, bundled rows and offline tasks"),
    Field("tasks", "list[str]", "as `qlora-recipes evaluate` takes them", "TASK", None),
    MARGIN_FLAG,
    Field("output", "str", "default: runs/<recipe>/benchmark", "FOLDER", None),
    count("limit", "only N documents of each task: a trial, which is no result", least=2),
    Field("launch", "bool | str", _LAUNCH, '"FLAGS"', None, expected="the launcher's flags in quotes"),
    count("jobs", "trainings at a time, a share of the processors each; with GPUs one each, and scorings too (1)", 1),
    Field(
        "slurm", "list[str]", "on a Slurm cluster, with these options of sbatch: partition=gpu time=240", "K=V", None
    ),
    Field("no_controls", "bool", "leave out the bases before tuning and the exchanged adapters", default=False),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for anything a user can fix; what is finished by then is kept.
        Stopped: when SIGTERM or SIGINT came; a training that runs has saved its step by then.
    """
    given = parse_with_recipe("qlora-recipes benchmark", _ABOUT, _FLAGS, argv)
    own = {"recipe", *(flag.name for flag in _FLAGS)} - {"demo"}
    plan = plan_benchmark(
        Path(given["recipe"]),
        **{name: given[name] for name in ("precisions", "seeds", "margin", "tasks", "limit")},
        flags={name: value for name, value in given.items() if name not in own},
        output=Path(given["output"]) if given["output"] else None,
    )
    launch = [] if given["launch"] is True else given["launch"].split() if given["launch"] else None
    engine: Engine = SideBySide(given["jobs"])
    if given["slurm"]:
        engine = Slurm(given["jobs"], read_options(given["slurm"]), plan.output / "logs" / "slurm")
    try:
        with StopSignals():
            run(plan, launch=launch, controls=not given["no_controls"], engine=engine)
    except Stopped as stopped:
        trained = sum(arm.folder.finished for arm in plan.arms)
        print(
            f"stopped by {stopped.signal.name}: {trained} of {len(plan.arms)} runs are trained; the same command "
            f"resumes, and keeps what is finished in {plan.output}",
            file=sys.stderr,
        )
        raise


def run(
    plan: Plan, *, launch: Sequence[str] | None = None, controls: bool = True, engine: Engine | None = None
) -> None:
    """Do what of a plan is not done yet, and write the report."""
    from qlora_recipes.comparison.folders import compare_folders  # scipy: not while flags are read
    from qlora_recipes.report.page import check_report_folder, write_report

    console, engine = Console(stderr=True), engine or SideBySide()
    page_folder = plan.output / "report"
    check_report_folder(page_folder)
    # An unknown or broken task is refused before anything is trained.
    asked = [task for found in load_tasks(plan.tasks).values() for task in found]
    names = [task.name for task in asked]
    fixed, said = preregister(plan, names)
    told = (describe(plan, names), power_of(asked, plan), said)
    console.print("\n".join(filter(None, told)), highlight=False, markup=False, soft_wrap=True)
    train_missing(plan, console, launch=launch, engine=engine)
    if engine.several and not engine.apart:
        engine.run(scoring.shared_jobs(plan, engine.workers, controls=controls), console)
    else:
        if engine.several:
            engine.run(scoring.missing_jobs(plan, names, controls=controls), console)
            console = Console(quiet=True)  # what is left is to read what they wrote
        scoring.score_missing(plan, console, controls=controls)
        scoring.measure_divergence(plan, console)
    report = compare_folders(
        [arm.folder.path for arm in plan.arms],
        plan.margin,
        tasks=names,
        baseline=plan.baseline,
        earlier_margins=fixed.margins[:-1],
        command=called(),
    )
    write_report(report, page_folder)
    say(report, page_folder)
    trackers = plan.flags.get("report_to") or ()
    trackers = [trackers] if isinstance(trackers, str) else trackers
    track(report, [name for name in trackers if name != "none"], plan.output)
