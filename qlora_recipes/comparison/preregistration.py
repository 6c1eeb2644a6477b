"""What a benchmark fixed before its first score, and how a comparison departs from it.

Files in, words out; knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_recipes.run.files import read_record

FILE = "benchmark.json"


@dataclass(frozen=True)
class Preregistration:
    """What `benchmark.json` holds, in the folder that the runs of a benchmark are in."""

    fixed: str
    """UTC, ISO 8601: when all of this was written down, but for `limit` and every margin after the first."""
    recipe: str
    demo: bool
    flags: list[str]
    precisions: list[str]
    """The baseline first."""
    baseline: str
    seeds: list[int]
    tasks: list[str]
    """As results name them."""
    limit: int | None
    margins: list[float]
    """Points; the first is the one that was fixed, the last the one in force."""
    scored_before: list[str]
    """Run folders that held scores by then: what is fixed after a look at scores is not fixed beforehand."""
    schema_version: Literal[1] = 1

    @property
    def time(self) -> str:
        """When it was fixed, for people."""
        return f"{self.fixed[:16].replace('T', ' ')} UTC"


def read_preregistration(folder: Path, *, fix: str) -> Preregistration | None:
    """Return what was fixed for the runs in a folder; None where nothing was.

    Raises:
        RunFolderError: when the file is damaged.
    """
    try:
        return read_record(folder / FILE, Preregistration, fix=fix)
    except FileNotFoundError:
        return None


def departures(
    plan: Preregistration | None,
    *,
    recipe: str,
    margin: float,
    precisions: Sequence[str],
    seeds: Sequence[int],
    tasks: Sequence[str],
) -> list[str]:
    """Return in words how a comparison departs from what was fixed; empty when it does not, and is confirmatory.

    `margin` is in points, and the first of `precisions` is the baseline.
    """
    if plan is None:
        return [f"no margin, tasks, seeds and precisions were fixed before the first score (no {FILE} beside the runs)"]
    fixed = f"fixed on {plan.time}"
    found = [f"{name} was scored already when the plan was {fixed}" for name in plan.scored_before]
    for what, planned, used in (
        ("recipe", plan.recipe, recipe),
        ("margin", f"±{plan.margins[0]:g}", f"±{margin:g}"),
        ("baseline", plan.baseline, precisions[0]),
    ):
        if used != planned:
            found.append(f"the {what} is {used} where {planned} was {fixed} before the first score")
    for what, all_planned, all_used in (
        ("precisions", plan.precisions, precisions),
        ("seeds", plan.seeds, seeds),
        ("tasks", plan.tasks, tasks),
    ):
        if left_out := [str(one) for one in all_planned if one not in all_used]:
            found.append(f"{what} left out of those {fixed}: {', '.join(left_out)}")
        if added := [str(one) for one in all_used if one not in all_planned]:
            found.append(f"{what} added to those {fixed}: {', '.join(added)}")
    return found
