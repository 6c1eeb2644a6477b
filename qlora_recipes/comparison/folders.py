"""From run folders to the report on them: reads what was scored, and what was fixed beforehand. Loads no model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qlora_recipes.comparison.build import build_report, choose_baseline
from qlora_recipes.comparison.controls import read_controls
from qlora_recipes.comparison.evaluated import Arms, group, read_scores
from qlora_recipes.comparison.findings import Report
from qlora_recipes.comparison.preregistration import read_preregistration
from qlora_recipes.errors import ComparisonError

_FIX_PLAN = "Remove the file, and the comparison is exploratory"


def read_arms(
    folders: Sequence[Path],
    tasks: Sequence[str] | None = None,
    baseline: str | None = None,
    *,
    other_spread: bool = False,
) -> Arms:
    """Return the scores of run folders by precision and seed, the baseline first; `other_spread` as in `group`.

    Raises:
        ComparisonError: when a run is not evaluated, or none has the precision of the baseline.
    """
    arms = group([read_scores(folder, tasks) for folder in folders], other_spread=other_spread)
    if baseline is not None and baseline not in arms:
        raise ComparisonError(f"no run has the precision {baseline}, expected as baseline; got {', '.join(arms)}")
    baseline = baseline or choose_baseline(list(arms))
    return {baseline: arms[baseline], **arms}


def compare_folders(
    folders: Sequence[Path],
    margin: float,
    *,
    tasks: Sequence[str] | None = None,
    baseline: str | None = None,
    other_spread: bool = False,
    earlier_margins: Sequence[float] = (),
    command: Sequence[str] = (),
) -> Report:
    """Return the report on run folders; `margin` is in points, `command` what was called, `other_spread` as in `group`.

    It tells the margins that earlier reports on them stated, and how it departs from a `benchmark.json` beside them.

    Raises:
        ComparisonError: when the runs differ in more than precision, are not evaluated, or say too little.
    """
    beside = {Path(os.path.realpath(folder)).parent for folder in folders}  # a loop of links too
    plan = read_preregistration(beside.pop(), fix=_FIX_PLAN) if len(beside) == 1 else None
    arms = read_arms(folders, tasks, baseline, other_spread=other_spread)
    controls = read_controls(arms)
    return build_report(
        arms, margin=margin, controls=controls, earlier_margins=earlier_margins, plan=plan, command=command
    )
