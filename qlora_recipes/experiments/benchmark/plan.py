"""What a benchmark will do: arms and seeds, resolved and checked before anything is trained.

Trains nothing and imports no torch.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_recipes.commands.flags import argv_of
from qlora_recipes.commands.recipe_cli import settings_from, without_secrets
from qlora_recipes.comparison.preregistration import FILE, Preregistration, read_preregistration
from qlora_recipes.errors import RunFolderError, UsageError
from qlora_recipes.evaluation.records import disk_faults
from qlora_recipes.evaluation.task_loading import usual_tasks
from qlora_recipes.precision import precision_named
from qlora_recipes.recipe import load_recipe
from qlora_recipes.run.differences import MISSING, differences
from qlora_recipes.run.files import write_json
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import Settings

_FIX = "Give --output another folder"
# Flags of a recipe that the benchmark sets itself, with what to give it in their place.
_OURS = {
    "precision": "--precisions",
    "seed": "--seeds",
    "output_dir": "--output",
    "plan": "the recipe itself",
    "resume": "nothing; it resumes by itself",
    "overwrite": "another --output",
}


@dataclass(frozen=True)
class Arm:
    """One run to be trained and evaluated."""

    settings: Settings
    argv: Sequence[str]
    """The recipe's command line, which gives these settings."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.settings.output_dir)

    @property
    def precision(self) -> str:
        return self.settings.precision.name

    @property
    def name(self) -> str:
        return f"{self.precision}, seed {self.settings.seed}"


@dataclass(frozen=True)
class Plan:
    """A benchmark with nothing left to decide."""

    recipe_file: Path
    arms: Sequence[Arm]
    """Seed by seed, the baseline first."""
    baseline: str
    precisions: list[str]
    """The baseline first."""
    seeds: list[int]
    tasks: list[str]
    margin: float
    """Points."""
    limit: int | None
    flags: Mapping[str, Any]
    """Flags that every arm passes on to the recipe, and their values."""
    output: Path

    def folders(self, precision: str) -> list[RunFolder]:
        """Return the run folders of a precision, in the order of the seeds."""
        return [arm.folder for arm in self.arms if arm.precision == precision]


def plan_benchmark(
    recipe_file: Path,
    *,
    precisions: Sequence[str],
    seeds: Sequence[int],
    margin: float,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    flags: Mapping[str, Any],
    output: Path | None = None,
) -> Plan:
    """Return the plan, with every arm's settings resolved; `flags` are those of the recipe and their values.

    Raises:
        UsageError: for a recipe, precision, seed or flag that cannot be, or that the benchmark sets itself.
    """
    dtype = _check(precisions, seeds, flags)
    from qlora_recipes.comparison.build import choose_baseline  # scipy: not while flags are checked

    recipe = load_recipe(recipe_file)
    baseline = choose_baseline(precisions)
    ordered = sorted(precisions, key=lambda name: name != baseline)
    name = settings_from(recipe, flags).name
    output = output or Path("runs") / name / "benchmark"
    arms = []
    for seed in seeds:
        for precision in ordered:
            folder = output / f"{precision}-seed{seed}"
            given = {**flags, "precision": precision, "seed": seed, "output_dir": str(folder)}
            if dtype == "float16" and precision_named(precision).dtype is None:
                given.setdefault("dtype", dtype)  # the quantized arms compute in the 16-bit arm's dtype
            arms.append(Arm(settings_from(recipe, given), argv_of(given)))
    held_out = any(spec.held_out > 0 for spec in recipe.datasets())
    tasks = tasks or usual_tasks(bool(flags.get("demo")), recipe.eval_tasks, held_out=held_out)
    return Plan(
        recipe_file=recipe_file,
        arms=arms,
        baseline=baseline,
        precisions=ordered,
        seeds=list(seeds),
        tasks=list(tasks),
        margin=margin,
        limit=limit,
        flags=flags,
        output=output,
    )


def _check(precisions: Sequence[str], seeds: Sequence[int], flags: Mapping[str, Any]) -> str | None:
    """Refuse arms that cannot be compared, and return the dtype of the 16-bit ones."""
    for what, values in (("precision", precisions), ("seed", seeds)):
        if twice := [value for value in values if list(values).count(value) > 1]:
            raise UsageError(f"--{what}s: {twice[0]} is given twice")
    if len(precisions) < 2:
        raise UsageError(f"--precisions: got {', '.join(precisions) or 'none'}, expected two or more, such as nf4 bf16")
    if min(seeds) < 0:
        raise UsageError(f"--seeds: got {min(seeds)}, expected whole numbers from 0 up")
    dtypes = {precision_named(name).dtype for name in precisions} - {None}
    if len(dtypes) > 1:
        raise UsageError("--precisions: bf16 and fp16 compute in different dtypes and cannot be arms of one comparison")
    if ours := [name for name in flags if name in _OURS]:
        raise UsageError(f"--{ours[0]} is set by the benchmark for every arm; give {_OURS[ours[0]]}")
    return next(iter(dtypes), None)


def check_trained(arm: Arm) -> None:
    """Refuse a finished run that was trained with other settings than are asked for now.

    Raises:
        RunFolderError: naming what differs.
    """
    receipt, settings = arm.folder.receipt(), arm.settings
    asked = {
        "recipe": settings.name,
        "precision": settings.precision.name,
        "dtype": settings.dtype,
        "demo": settings.demo,
        "base": {"model": settings.model},
        "data": {"source": settings.dataset_name},
        "settings": {"lora": dict(settings.lora), "training": dict(settings.training)},
    }
    for key, was, expected in differences(receipt, json.loads(json.dumps(asked, default=str))):
        if MISSING not in (was, expected):  # a key that only one has: another version's setting, or the outcome
            raise RunFolderError(
                f"{arm.folder.path} was trained with {key} {was!r}, and {expected!r} is asked for. {_FIX}"
            )


def describe(plan: Plan, tasks: Sequence[str]) -> str:
    """Return what a benchmark is about to do, for people; `tasks` as results name them."""
    arms = ", ".join(f"{name} (baseline)" if name == plan.baseline else name for name in plan.precisions)
    return "\n".join(
        (
            f"arms    {arms}",
            f"seeds   {', '.join(map(str, plan.seeds))}: {len(plan.arms)} runs, in {plan.output}",
            f"tasks   {', '.join(tasks)}",
            f"margin  ±{plan.margin:g} points",
        )
    )


def preregister(plan: Plan, tasks: Sequence[str]) -> tuple[Preregistration, str]:
    """Write down what is to be measured and judged by; return what is in force, and what was done in words.

    Until the first score a plan may change. From then on what was fixed stays, and another margin is recorded after it.
    `tasks` as results name them.

    Raises:
        RunFolderError: when the folder is another benchmark's.
    """
    earlier = read_preregistration(plan.output, fix=_FIX)
    flags = {name: value for name, value in plan.flags.items() if name != "demo"}
    scores = plan.output.glob("*/evaluation/**/*.docs.jsonl")
    scored = sorted({file.relative_to(plan.output).parts[0] for file in scores})
    record = Preregistration(
        fixed=_now(),
        recipe=plan.arms[0].settings.name,
        demo=bool(plan.flags.get("demo")),
        flags=without_secrets(argv_of(flags)),
        precisions=plan.precisions,
        baseline=plan.baseline,
        seeds=plan.seeds,
        tasks=list(tasks),
        limit=plan.limit,
        margins=[plan.margin],
        scored_before=scored,
    )
    if earlier:
        _check_same_benchmark(plan, earlier, record)
    else:
        _check_folder(plan)
    said = f"fixed before the first score, {record.time}"
    if earlier and (scored or record == replace(earlier, fixed=record.fixed)):
        repeated = earlier.margins[-1:] == record.margins
        margins = earlier.margins if repeated else [*earlier.margins, plan.margin]
        record = replace(earlier, margins=margins, limit=plan.limit)
        said = f"fixed on {record.time}"
    elif earlier:
        said += f", in place of what was fixed on {earlier.time}: nothing is scored yet"
    elif scored:
        said = f"fixed on {record.time}, after {', '.join(scored)} had been scored: what follows is exploratory"
    if record != earlier:
        with disk_faults(plan.output, _FIX):
            plan.output.mkdir(parents=True, exist_ok=True)
            write_json(plan.output / FILE, asdict(record))
    return record, said


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _check_same_benchmark(plan: Plan, earlier: Preregistration, record: Preregistration) -> None:
    for key in ("recipe", "demo", "flags"):
        was, expected = getattr(earlier, key), getattr(record, key)
        if was != expected:
            raise RunFolderError(f"{plan.output} is a benchmark with {key} {was!r}, expected {expected!r}. {_FIX}")
    if earlier.limit is None and plan.limit is not None:
        raise RunFolderError(f"{plan.output} holds whole results. Give a trial with --limit another folder (--output)")


def _check_folder(plan: Plan) -> None:
    """Refuse a folder without a plan that holds anything but what a benchmark like this one would have left."""
    ours = {"logs", "report", *(arm.folder.path.name for arm in plan.arms)}
    if plan.output.is_dir() and any(file.name not in ours for file in plan.output.iterdir()):
        raise RunFolderError(f"{plan.output} holds other files. {_FIX}")
