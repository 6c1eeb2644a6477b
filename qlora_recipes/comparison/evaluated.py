"""Evaluated runs, read from disk and lined up: the same documents in the same order, or a refusal that says why.

Files in, dataclasses out; knows nothing of statistics, models or reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from qlora_recipes.comparison.alignment import align
from qlora_recipes.comparison.receipts import check_same
from qlora_recipes.errors import ComparisonError, nearest
from qlora_recipes.evaluation.records import DocRecord, TaskResult, read_task
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt

# What two results of one task must share, so that the same thing was measured in the same way.
_SAME_MEASUREMENT = (
    "kind",
    "metric",
    "higher_is_better",
    "version",
    "limit",
    "num_fewshot",
    "chat_template",
    "template_sha256",
    "batch_size",
    "loglikelihood_dtype",
    "device",
)


@dataclass(frozen=True)
class Results:
    """The scores of one set of weights in every task."""

    name: str
    """As messages call it."""
    tasks: Mapping[str, TaskResult]
    documents: Mapping[str, Sequence[DocRecord]]


@dataclass(frozen=True)
class Run:
    """A trained run with its receipt and its scores."""

    folder: RunFolder
    receipt: Receipt
    results: Results

    @property
    def precision(self) -> str:
        return self.receipt.precision

    @property
    def seed(self) -> int:
        return self.receipt.seed


@dataclass(frozen=True)
class AlignedScores:
    """The same thing measured with one or more seeds, its documents in the order of a common reference."""

    name: str
    results: Sequence[Results]
    """One for each seed."""

    def task(self, name: str) -> TaskResult:
        """Return the first seed's result, whose conditions are those of the others too."""
        return self.results[0].tasks[name]

    def scores(self, task: str) -> np.ndarray:
        """Return the scores of a task, shape (seeds, documents)."""
        return np.array([[document.score for document in seed.documents[task]] for seed in self.results])


def read_results(folder: Path, tasks: Sequence[str] | None = None, *, name: str = "") -> Results:
    """Return a folder's scores in the tasks named, or in all it has.

    Raises:
        ComparisonError: when there are none, or not the one asked for.
        RecipesError: when a file is damaged or a score is not a number.
    """
    name = name or str(folder)
    there = [unquote(file.name.removesuffix(".docs.jsonl")) for file in sorted(folder.glob("*.docs.jsonl"))]
    if not there:
        raise ComparisonError(f"{name} is not evaluated: {folder} holds no scores. Run: qlora-recipes evaluate RUN")
    if missing := [task for task in tasks or () if task not in there]:
        raise ComparisonError(
            f"{name} is not evaluated on {missing[0]!r}, only on {', '.join(there)}.{nearest(missing[0], there)} "
            f"Run: qlora-recipes evaluate RUN --tasks {missing[0]}"
        )
    read = {task: read_task(folder, task) for task in tasks or there}
    return Results(
        name, {task: result for task, (result, _) in read.items()}, {t: docs for t, (_, docs) in read.items()}
    )


def read_scores(path: Path, tasks: Sequence[str] | None = None) -> Run:
    """Return a run with its scores, which are proven to be those of its own adapter on its own base.

    Raises:
        RecipesError: when it is not trained, not evaluated, or was evaluated with other weights.
    """
    folder = RunFolder(path)
    receipt = folder.receipt()
    if not (folder.adapter / "adapter_model.safetensors").is_file():
        raise ComparisonError(
            f"{path} has a receipt and no adapter; expected a run as training left it. Train it again"
        )
    run = Run(folder, receipt, read_results(folder.evaluation, tasks, name=str(path)))
    for task, result in run.results.tasks.items():
        _check_weights(run, task, "adapter", result.adapter_sha256, receipt.adapter.final_sha256)
        _check_weights(run, task, "base", result.base_sha256, receipt.base.sha256)
    return run


def _check_weights(run: Run, task: str, what: str, scored: str | None, trained: str) -> None:
    if scored != trained:
        raise ComparisonError(
            f"{run.folder.path}: {task} was scored with the {what} {str(scored)[:12]}, and the receipt's is "
            f"{trained[:12]}. Evaluate the run again"
        )


def group(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Return precision to seed to run, for runs that differ in precision and seed and in nothing else.

    Raises:
        ComparisonError: naming what else differs, what is given twice, or which seed an arm lacks.
    """
    arms: dict[str, dict[int, Run]] = {}
    for run in runs:
        twin = arms.setdefault(run.precision, {}).setdefault(run.seed, run)
        if twin is not run:
            raise ComparisonError(
                f"{twin.folder.path} and {run.folder.path} are both {run.precision} with seed {run.seed}; expected two "
                "precisions of each seed"
            )
    if len(arms) < 2:
        raise ComparisonError(f"got runs of {', '.join(arms) or 'nothing'} alone, expected two precisions or more")
    first = runs[0]
    for run in runs[1:]:
        names = str(first.folder.path), str(run.folder.path)
        check_same(first.receipt, run.receipt, names, same_seed=False)
    _check_pairs(arms)
    return {precision: dict(sorted(by_seed.items())) for precision, by_seed in arms.items()}


def _check_pairs(arms: Mapping[str, Mapping[int, Run]]) -> None:
    """Every arm has every seed, and the runs of one seed started from the same adapter."""
    (one, first), *others = arms.items()
    for precision, by_seed in others:
        if by_seed.keys() != first.keys():
            raise ComparisonError(
                f"got seeds {sorted(first)} of {one} and {sorted(by_seed)} of {precision}, expected the same of both: "
                "runs are compared seed by seed. Train what is missing"
            )
        for seed, run in by_seed.items():
            names = str(first[seed].folder.path), str(run.folder.path)
            check_same(first[seed].receipt, run.receipt, names)


def align_runs(name: str, results: Sequence[Results], reference: Results) -> AlignedScores:
    """Return results with the documents of every task in the reference's order.

    Raises:
        ComparisonError: when a task or a document is not in both, or was measured under other conditions.
    """
    return AlignedScores(name, [_lined_up(seed, reference) for seed in results])


def _lined_up(results: Results, reference: Results) -> Results:
    if results.tasks.keys() != reference.tasks.keys():
        only = sorted(results.tasks.keys() ^ reference.tasks.keys())
        raise ComparisonError(
            f"{results.name} and {reference.name} are not evaluated on the same tasks: {', '.join(only)} is in one of "
            "them alone. Evaluate both with the same --tasks, or compare with --tasks"
        )
    for task, result in results.tasks.items():
        _check_measurement(results, reference, result, reference.tasks[task])
    documents = {}
    for task in reference.tasks:
        try:
            documents[task] = align(reference.documents[task], results.documents[task]).b
        except ComparisonError as error:
            raise ComparisonError(f"{reference.name} (a) and {results.name} (b): {error}") from error
    return Results(results.name, results.tasks, documents)


def _check_measurement(results: Results, reference: Results, one: TaskResult, other: TaskResult) -> None:
    for key in _SAME_MEASUREMENT:
        if (got := getattr(one, key)) != (expected := getattr(other, key)):
            raise ComparisonError(
                f"{one.task} was measured with {key} {got!r} in {results.name} and {expected!r} in {reference.name}; "
                "evaluate one of them again"
            )
