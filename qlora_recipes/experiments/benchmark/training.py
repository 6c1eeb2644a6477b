"""Trains the arms of a benchmark, each in a fresh process, and keeps what is finished. Knows nothing of scores."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from qlora_recipes.experiments.benchmark.jobs import Engine, Job, SideBySide
from qlora_recipes.experiments.benchmark.plan import Arm, Plan, check_trained


def train_missing(
    plan: Plan, console: Console, *, launch: Sequence[str] | None = None, engine: Engine | None = None
) -> None:
    """Train every arm that has no receipt; an unfinished run resumes from its newest intact checkpoint.

    Raises:
        RunFolderError: when a finished run was trained with other settings.
        CheckError: when a training fails, with the end of what it said; so does resuming one of other settings.
        Stopped: when a training was ended by a signal.
    """
    for arm in plan.arms:
        if arm.folder.finished:
            check_trained(arm)
    engine = engine or SideBySide()
    if launch is not None and engine.several and "--main_process_port" not in launch:
        launch = ["--main_process_port", "0", *launch]  # a free one for each, in place of 29500 for all
    engine.run([_job(plan, arm, launch) for arm in plan.arms if not arm.folder.finished], console)


def _job(plan: Plan, arm: Arm, launch: Sequence[str] | None) -> Job:
    launcher = ("-m", "accelerate.commands.launch", *launch) if launch is not None else ()
    return Job(
        arm.name,
        (*launcher, "-m", "qlora_recipes.cli", "train", str(plan.recipe_file), *arm.argv),
        log=plan.output / "logs" / f"{arm.folder.path.name}.log",
        folder=arm.folder,
        trains=True,
        launched=launch is not None,
    )
