"""What was measured beside the arms and lies in their run folders: controls, divergence, quantization error.

Reads files; what is missing is left out, and what was measured on other weights is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_recipes.comparison.build import NOISE, Controls
from qlora_recipes.comparison.evaluated import Results, Run, group, read_results
from qlora_recipes.errors import ComparisonError
from qlora_recipes.evaluation.kl_files import Divergence, read_divergence, read_quantization_error
from qlora_recipes.evaluation.records import finished_tasks

BASE = "base"
"""Folder in a run's evaluation where its base before tuning is scored."""


def swapped_folder(precision: str) -> str:
    """Return the folder in a run's evaluation where its adapter is scored on another precision's base."""
    return f"on-{precision}"


def read_controls(runs: Sequence[Run], baseline: str) -> Controls:
    """Return everything that lies beside the runs' own scores.

    Raises:
        ComparisonError: when a control was scored with other weights than the runs'.
    """
    arms = group(runs)
    others = [name for name in arms if name != baseline]
    return Controls(
        bases={name: found for name, by_seed in arms.items() if (found := _base(name, by_seed)) is not None},
        cross_base={name: found for name in others if (found := _swapped(name, arms, baseline))},
        divergences=_divergences(arms, baseline),
        quantization_errors={
            name: errors for name in others if (errors := read_quantization_error(_first(arms[name]).folder))
        },
    )


def _first(by_seed: Mapping[int, Run]) -> Run:
    return next(iter(by_seed.values()))


def _base(name: str, by_seed: Mapping[int, Run]) -> Results | None:
    """The base has no seed: it is scored once, in the folder of any of its runs."""
    for run in by_seed.values():
        found = _read(run.folder.evaluation / BASE, run, f"{name} base before tuning")
        if found is not None:
            _check(found, None, run.receipt.base.sha256)
            return found
    return None


def _swapped(name: str, arms: Mapping[str, Mapping[int, Run]], baseline: str) -> list[Results]:
    """All seeds or none: a control of fewer seeds would be held against means of more."""
    found = []
    for seed, run in arms[baseline].items():
        results = _read(run.folder.evaluation / swapped_folder(name), run, f"{baseline} seed {seed} on {name}")
        if results is None:
            return []
        _check(results, run.receipt.adapter.final_sha256, arms[name][seed].receipt.base.sha256)
        found.append(results)
    return found


def _read(folder: Path, run: Run, name: str) -> Results | None:
    tasks = list(run.results.tasks)
    return read_results(folder, tasks, name=name) if set(tasks) <= set(finished_tasks(folder)) else None


def _check(results: Results, adapter: str | None, base: str) -> None:
    for task, result in results.tasks.items():
        for what, scored, expected in (
            ("adapter", result.adapter_sha256, adapter),
            ("base", result.base_sha256, base),
        ):
            if scored != expected:
                raise ComparisonError(
                    f"{results.name}: {task} was scored with the {what} {str(scored)[:12]}, expected "
                    f"{str(expected)[:12]}. Evaluate this control again with --overwrite"
                )


def _divergences(arms: Mapping[str, Mapping[int, Run]], baseline: str) -> dict[str, Divergence]:
    reference = _first(arms[baseline]).folder
    pairs = {name: _first(by_seed).folder for name, by_seed in arms.items() if name != baseline}
    if len(arms[baseline]) > 1:
        pairs[NOISE] = list(arms[baseline].values())[1].folder
    return {name: found for name, run in pairs.items() if (found := read_divergence(reference, run)) is not None}
