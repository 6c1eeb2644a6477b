"""Evaluates the arms and controls of a benchmark from disk, one base in memory at a time, and keeps what is done.

Knows nothing of training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from qlora_recipes.evaluation.harness import Options, evaluate_many
from qlora_recipes.evaluation.kl import measure
from qlora_recipes.evaluation.records import finished_tasks
from qlora_recipes.experiments.benchmark.plan import Plan
from qlora_recipes.run.folder import RunFolder


def score_missing(plan: Plan, console: Console, *, controls: bool = True) -> list[str]:
    """Score every arm and control that has no result yet, and return the names of the tasks.

    Controls: each base before tuning, and the baseline's adapters on every other base.
    """
    tasks: list[str] = []
    trusted = all(arm.settings.trust_remote_code for arm in plan.arms)
    options = Options(limit=plan.limit, trust_remote_code=trusted)
    for precision in plan.precisions:
        folders = plan.folders(precision)
        tasks = _score(plan, precision, folders, options, console)
        if controls:
            before = replace(options, adapter=False)
            _score(plan, f"{precision} base before tuning", folders[:1], before, console)
        if controls and precision != plan.baseline:
            cross_base = replace(options, precision=precision)
            name = f"{plan.baseline} adapters on the {precision} base"
            _score(plan, name, plan.folders(plan.baseline), cross_base, console)
    return tasks


def _score(plan: Plan, name: str, folders: Sequence[RunFolder], options: Options, console: Console) -> list[str]:
    started = time.monotonic()
    earlier = [finished_tasks(folder.evaluation / options.control(folder.receipt())) for folder in folders]
    limits = {result.limit for results in earlier for result in results.values()}
    overwrite = bool(limits - {None, options.limit})  # the results of a trial, which any others replace
    found = evaluate_many(folders, plan.tasks, options=options, overwrite=overwrite, console=console)
    console.print(f"{name}: evaluated in {time.monotonic() - started:.0f} s", highlight=False)
    return [result.task for result in found[0]]


def measure_divergence(plan: Plan, console: Console) -> None:
    """Measure KL from the baseline to every arm, and to the baseline's second seed, where it is not on disk yet."""
    reference, *seeds = plan.folders(plan.baseline)
    others = [plan.folders(precision)[0] for precision in plan.precisions if precision != plan.baseline]
    if reference.receipt().data.rows_held_out:
        measure(reference, [*seeds[:1], *others], said=lambda text: console.print(text, highlight=False))
