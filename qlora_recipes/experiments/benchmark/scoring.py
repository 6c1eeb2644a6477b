"""Evaluates the arms and controls of a benchmark from disk, one base in memory at a time, and keeps what is done.

Knows nothing of training.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence

from rich.console import Console

from qlora_recipes.commands.flags import argv_of
from qlora_recipes.evaluation.records import TaskResult, finished_tasks, read_divergence
from qlora_recipes.experiments.benchmark.jobs import Job
from qlora_recipes.experiments.benchmark.plan import Plan
from qlora_recipes.run.folder import RunFolder


def score_missing(plan: Plan, console: Console, *, controls: bool = True) -> None:
    """Score every arm and control that has no result yet, in this process."""
    from qlora_recipes.evaluation.harness import Options, evaluate_many  # torch: not while others train

    for name, control, folders in _groups(plan, controls):
        started = time.monotonic()
        options = Options(
            limit=plan.limit,
            trust_remote_code=_trusted(plan),
            adapter=control != "base",
            precision=_other_base(control),
        )
        overwrite = any(_of_a_trial(plan, folder, control) for folder in folders)
        evaluate_many(folders, plan.tasks, options=options, overwrite=overwrite, console=console)
        console.print(f"{name}: evaluated in {time.monotonic() - started:.0f} s", highlight=False)


def missing_jobs(plan: Plan, tasks: Sequence[str], *, controls: bool = True) -> list[Job]:
    """Return a job for every run and control that has no result yet, and for KL; `tasks` as results name them.

    Each leaves what `score_missing` or `measure_divergence` would have written, and has nothing to do with the others.
    """
    scorings = (
        (folder, control)
        for _, control, folders in _groups(plan, controls)
        for folder in folders
        if not set(tasks) <= _finished(folder, control).keys() or _of_a_trial(plan, folder, control)
    )
    reference, others = _measured(plan)
    divergence = [_divergence(plan)] if not all(read_divergence(reference, other) for other in others) else []
    return [_job(plan, [command]) for command in (*(_evaluate(plan, *scoring) for scoring in scorings), *divergence)]


def shared_jobs(plan: Plan, processes: int, *, controls: bool = True) -> list[Job]:
    """Return as many jobs as there are to be processes, each with its share of all that is scored, and of KL.

    What has a result is proven to be what is asked for, and kept.
    """
    commands = [
        _evaluate(plan, folder, control) for _, control, folders in _groups(plan, controls) for folder in folders
    ]
    commands += [_divergence(plan)] if _measured(plan)[1] else []
    return [_job(plan, share) for start in range(processes) if (share := commands[start::processes])]


def _groups(plan: Plan, controls: bool) -> Iterator[tuple[str, str, list[RunFolder]]]:
    """Yield what is scored on one base, with the control's name: the base, its arms, the baseline's adapters on it."""
    for precision in plan.precisions:
        folders = plan.folders(precision)
        if controls:
            yield f"{precision} base before tuning", "base", folders[:1]
        yield precision, "", folders
        if controls and precision != plan.baseline:
            name = f"{plan.baseline} adapters on the {precision} base"
            yield name, f"on-{precision}", plan.folders(plan.baseline)


def _other_base(control: str) -> str | None:
    return control.removeprefix("on-") if control.startswith("on-") else None


def _trusted(plan: Plan) -> bool:
    return all(arm.settings.trust_remote_code for arm in plan.arms)


def _finished(folder: RunFolder, control: str) -> dict[str, TaskResult]:
    return finished_tasks(folder.evaluation / control)


def _of_a_trial(plan: Plan, folder: RunFolder, control: str) -> bool:
    """Whether there are results of a trial, which any others replace."""
    return bool({result.limit for result in _finished(folder, control).values()} - {None, plan.limit})


_Command = tuple[str, list[str]]
"""What it does, for people, and its words for `share`."""


def _evaluate(plan: Plan, folder: RunFolder, control: str) -> _Command:
    given = {
        "tasks": plan.tasks,
        "limit": plan.limit,
        "precision": _other_base(control),
        "no_adapter": control == "base",
        "trust_remote_code": _trusted(plan),
        "overwrite": _of_a_trial(plan, folder, control),
    }
    flags = argv_of({name: value for name, value in given.items() if value})
    return "-".join(filter(None, (folder.path.name, control))), ["evaluate", str(folder.path), *flags]


def _divergence(plan: Plan) -> _Command:
    reference, others = _measured(plan)
    return "divergence", ["divergence", *(str(run.path) for run in (reference, *others))]


def _job(plan: Plan, commands: Sequence[_Command]) -> Job:
    names = [name for name, _ in commands]
    return Job(
        ", ".join(names),
        ("-m", "qlora_recipes.experiments.benchmark.share", *(shlex.join(words) for _, words in commands)),
        log=plan.output / "logs" / f"{names[0]}.scores.log",
        folder=plan.arms[0].folder,
        trains=False,
    )


def measure_divergence(plan: Plan, console: Console) -> None:
    """Measure KL from the baseline to every arm, and to the baseline's second seed, where it is not on disk yet."""
    from qlora_recipes.evaluation.kl import measure  # torch

    reference, others = _measured(plan)
    measure(reference, others, said=lambda text: console.print(text, highlight=False))


def _measured(plan: Plan) -> tuple[RunFolder, list[RunFolder]]:
    reference, *seeds = plan.folders(plan.baseline)
    others = [plan.folders(precision)[0] for precision in plan.precisions if precision != plan.baseline]
    return reference, [*seeds[:1], *others] if reference.receipt().data.rows_held_out else []
