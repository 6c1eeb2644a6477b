"""Evaluates the arms and controls of a benchmark from disk, one base in memory at a time, and keeps what is done.

Knows nothing of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from qlora_recipes.commands.flags import argv_of
from qlora_recipes.evaluation.harness import Options, evaluate_many
from qlora_recipes.evaluation.kl import measure
from qlora_recipes.evaluation.records import TaskResult, finished_tasks, read_divergence
from qlora_recipes.experiments.benchmark.jobs import Job
from qlora_recipes.experiments.benchmark.plan import Plan
from qlora_recipes.run.folder import RunFolder


def score_missing(plan: Plan, console: Console, *, controls: bool = True) -> list[str]:
    """Score every arm and control that has no result yet, and return the names of the tasks."""
    tasks: list[str] = []
    for name, folders, options in _groups(plan, controls):
        started = time.monotonic()
        overwrite = any(_of_a_trial(folder, options) for folder in folders)
        found = evaluate_many(folders, plan.tasks, options=options, overwrite=overwrite, console=console)
        console.print(f"{name}: evaluated in {time.monotonic() - started:.0f} s", highlight=False)
        tasks = tasks or [result.task for result in found[0]]
    return tasks


def scoring_jobs(plan: Plan, tasks: Sequence[str], *, controls: bool = True) -> list[Job]:
    """Return a job for every run and control that has no result yet; `tasks` as results name them.

    Each leaves what `score_missing` would have written, and has nothing to do with the others.
    """
    return [
        _job(plan, folder, options)
        for _, folders, options in _groups(plan, controls)
        for folder in folders
        if not set(tasks) <= _finished(folder, options).keys() or _of_a_trial(folder, options)
    ]


def _groups(plan: Plan, controls: bool) -> Iterator[tuple[str, list[RunFolder], Options]]:
    """Yield what is scored on one base: its arms, the base before tuning, and the baseline's adapters on it."""
    trusted = all(arm.settings.trust_remote_code for arm in plan.arms)
    options = Options(limit=plan.limit, trust_remote_code=trusted)
    for precision in plan.precisions:
        folders = plan.folders(precision)
        yield precision, folders, options
        if controls:
            yield f"{precision} base before tuning", folders[:1], replace(options, adapter=False)
        if controls and precision != plan.baseline:
            name, cross_base = (
                f"{plan.baseline} adapters on the {precision} base",
                replace(options, precision=precision),
            )
            yield name, plan.folders(plan.baseline), cross_base


def _finished(folder: RunFolder, options: Options) -> dict[str, TaskResult]:
    return finished_tasks(folder.evaluation / options.control(folder.receipt()))


def _of_a_trial(folder: RunFolder, options: Options) -> bool:
    """Whether there are results of a trial, which any others replace."""
    return bool({result.limit for result in _finished(folder, options).values()} - {None, options.limit})


def _job(plan: Plan, folder: RunFolder, options: Options) -> Job:
    flags: dict[str, Any] = {"tasks": plan.tasks}
    given = {
        "limit": options.limit,
        "precision": options.precision,
        "no_adapter": not options.adapter,
        "trust_remote_code": options.trust_remote_code,
        "overwrite": _of_a_trial(folder, options),
    }
    flags |= {name: value for name, value in given.items() if value}
    name = "-".join(filter(None, (folder.path.name, options.control(folder.receipt()))))
    return Job(
        name,
        ("-m", "qlora_recipes.cli", "evaluate", str(folder.path), *argv_of(flags)),
        log=plan.output / "logs" / f"{name}.scores.log",
        folder=folder,
        trains=False,
    )


def divergence_jobs(plan: Plan) -> list[Job]:
    """Return the job that does what `measure_divergence` would, or none where that is done."""
    reference, others = _measured(plan)
    if all(read_divergence(reference, other) for other in others):
        return []
    runs, logs = [str(arm.folder.path) for arm in plan.arms], plan.output / "logs"
    flags = argv_of({"baseline": plan.baseline, "divergence": True, "output": str(logs / "divergence")})
    return [
        Job(
            "divergence",
            ("-m", "qlora_recipes.cli", "compare", *runs, *flags),
            log=logs / "divergence.log",
            folder=reference,
            trains=False,
        )
    ]


def measure_divergence(plan: Plan, console: Console) -> None:
    """Measure KL from the baseline to every arm, and to the baseline's second seed, where it is not on disk yet."""
    reference, others = _measured(plan)
    measure(reference, others, said=lambda text: console.print(text, highlight=False))


def _measured(plan: Plan) -> tuple[RunFolder, list[RunFolder]]:
    reference, *seeds = plan.folders(plan.baseline)
    others = [plan.folders(precision)[0] for precision in plan.precisions if precision != plan.baseline]
    return reference, [*seeds[:1], *others] if reference.receipt().data.rows_held_out else []
