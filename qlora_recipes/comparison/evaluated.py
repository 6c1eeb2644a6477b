"""Evaluated runs, read from disk and aligned: the same documents in the same order, or a refusal that says why.

Files in, dataclasses out; knows nothing of statistics, models or reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import numpy as np

from qlora_recipes.comparison.proof import check_adapter, check_arms, check_scores, check_start, check_storage
from qlora_recipes.comparison.receipts import own_starts, receipt_differences
from qlora_recipes.errors import ComparisonError, nearest
from qlora_recipes.evaluation.records import DocRecord, TaskResult, read_task
from qlora_recipes.run.differences import shortened
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt

# What two results of one task must share, so that the same thing was measured in the same way.
_SAME_MEASUREMENT = (
    "kind metric higher_is_better version limit num_fewshot chat_template template_sha256 batch_size "
    "loglikelihood_dtype device decoding config_sha256"
).split()
# What makes two documents the same one; never their place in the task.
_IDENTITY = ("task", "doc_hash", "prompt_hash", "target_hash")
_Key = tuple[str | int, ...]


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


Arms = Mapping[str, Mapping[int, Run]]
"""Precision to seed to run; the baseline first once it is chosen."""


@dataclass(frozen=True)
class AlignedScores:
    """The same thing measured with one or more seeds, its documents in the order of a common reference."""

    name: str
    results: Sequence[Results]
    """One for each seed."""

    @property
    def tasks(self) -> Mapping[str, TaskResult]:
        """The first seed's results, whose conditions are those of the others too."""
        return self.results[0].tasks

    def documents(self, task: str) -> list[Sequence[DocRecord]]:
        """Return the documents of a task, one sequence for each seed."""
        return [seed.documents[task] for seed in self.results]

    def scores(self, task: str, of: Literal["score", "bits"] = "score") -> np.ndarray:
        """Return the scores of a task, or the bits of its texts, shape (seeds, documents)."""
        return np.array([[getattr(document, of) for document in documents] for documents in self.documents(task)])


def read_results(folder: Path, tasks: Sequence[str], name: str) -> Results:
    """Return a folder's scores in the tasks named.

    Raises:
        UnfinishedTaskError: when one of them is not there.
        RunFolderError: when a file is damaged.
        ComparisonError: when a figure is not that of the documents.
    """
    read = {task: read_task(folder, task) for task in tasks}
    for result, documents in read.values():
        check_scores(name, result, documents)
    return Results(name, {task: read[task][0] for task in tasks}, {task: read[task][1] for task in tasks})


def read_scores(path: Path, tasks: Sequence[str] | None = None) -> Run:
    """Return a run with its scores in the tasks named, or in all it has, proven to be those of its own weights.

    Raises:
        RecipesError: when it is not trained, not evaluated, was evaluated with other weights, or contradicts itself.
    """
    folder = RunFolder(path)
    receipt = folder.receipt()
    if not (adapter := folder.adapter / "adapter_model.safetensors").is_file():
        raise ComparisonError(
            f"{path} has a receipt and no adapter; expected a run as training left it. Train it again"
        )
    there = [unquote(file.name.removesuffix(".docs.jsonl")) for file in sorted(folder.evaluation.glob("*.docs.jsonl"))]
    if not there:
        raise ComparisonError(
            f"{path} is not evaluated: {folder.evaluation} holds no scores. Run: qlora-recipes evaluate RUN"
        )
    if missing := [task for task in tasks or () if task not in there]:
        raise ComparisonError(
            f"{path} is not evaluated on {missing[0]!r}, only on {', '.join(there)}.{nearest(missing[0], there)} "
            f"Run: qlora-recipes evaluate RUN --tasks {missing[0]}"
        )
    check_storage(path, receipt)
    check_start(path, receipt)
    check_adapter(path, receipt, adapter)
    results = read_results(folder.evaluation, tasks or there, str(path))
    check_weights(results, receipt.adapter.final_sha256, receipt.base.sha256, "the run again")
    return Run(folder, receipt, results)


def check_weights(results: Results, adapter: str | None, base: str, what: str) -> None:
    """Refuse scores of other weights than an adapter (None for the base alone) and a base with these hashes.

    Raises:
        ComparisonError: naming the task; `what` is what to evaluate again.
    """
    for task, result in results.tasks.items():
        for part, scored, expected in (("adapter", result.adapter_sha256, adapter), ("base", result.base_sha256, base)):
            if scored != expected:
                raise ComparisonError(
                    f"{results.name}: {task} was scored with the {part} {str(scored)[:12]}, expected "
                    f"{str(expected)[:12]}. Evaluate {what}"
                )


def group(runs: Sequence[Run], *, other_spread: bool = False) -> dict[str, dict[int, Run]]:
    """Return precision to seed to run, for runs that differ in precision and seed and in nothing else.

    With `other_spread` they may also have been spread over processes in different ways.

    Raises:
        ComparisonError: naming what else differs, what is given twice or is a copy, or which seed an arm lacks.
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
    for run in runs[1:]:
        _check_same(runs[0], run, same_seed=False, other_spread=other_spread)
    check_arms([(run.folder.path, run.receipt) for run in runs])
    (one, first), *others = arms.items()
    for precision, by_seed in others:
        if by_seed.keys() != first.keys():
            raise ComparisonError(
                f"got seeds {sorted(first)} of {one} and {sorted(by_seed)} of {precision}, expected the same of both: "
                "runs are compared seed by seed. Train what is missing"
            )
        for seed, run in by_seed.items():
            _check_same(first[seed], run, other_spread=other_spread)
        if len({own_starts(first[seed].receipt, run.receipt) for seed, run in by_seed.items()}) > 1:
            raise ComparisonError(
                f"the runs of {one} and {precision} start from one adapter with some seeds and from two with others; "
                "expected the same with every seed. Train them alike"
            )
    return {precision: dict(sorted(by_seed.items())) for precision, by_seed in arms.items()}


def _check_same(a: Run, b: Run, *, same_seed: bool = True, other_spread: bool = False) -> None:
    """Refuse two runs that differ in anything but precision (and, unless `same_seed`, the seed)."""
    found = receipt_differences(a.receipt, b.receipt, same_seed=same_seed, other_spread=other_spread)
    if lines := [f"  - {key}: {shortened(left)} and {shortened(right)}" for key, left, right in found]:
        spread_alone = not any(receipt_differences(a.receipt, b.receipt, same_seed=same_seed, other_spread=True))
        raise ComparisonError(
            f"{a.folder.path} and {b.folder.path} differ in more than precision:\n" + "\n".join(lines) + "\n"
            "Expected equal values in both; train one of them again with the other's settings"
            + ", or give --other_spread: they differ in how they were spread over processes"
            * spread_alone
        )


def align_runs(name: str, results: Sequence[Results], reference: Results) -> AlignedScores:
    """Return results with the documents of every task in the reference's order.

    Raises:
        ComparisonError: when a task or a document is not in both, or was measured under other conditions.
    """
    return AlignedScores(name, [_aligned(seed, reference) for seed in results])


def _aligned(results: Results, reference: Results) -> Results:
    if results.tasks.keys() != reference.tasks.keys():
        only = sorted(results.tasks.keys() ^ reference.tasks.keys())
        raise ComparisonError(
            f"{results.name} and {reference.name} are not evaluated on the same tasks: only one of them has "
            f"{', '.join(only)}. Evaluate both with the same --tasks, or compare with --tasks"
        )
    documents = {}
    for task, measured in reference.tasks.items():
        for key in _SAME_MEASUREMENT:
            if (got := getattr(results.tasks[task], key)) != (expected := getattr(measured, key)):
                raise ComparisonError(
                    f"{task} was measured with {key} {got!r} in {results.name} and {expected!r} in {reference.name}; "
                    "evaluate one of them again"
                )
        try:
            documents[task] = align(reference.documents[task], results.documents[task])
        except ComparisonError as error:
            raise ComparisonError(f"{task} in {reference.name} (a) and {results.name} (b): {error}") from error
    return Results(results.name, results.tasks, documents)


def align(docs_a: Sequence[DocRecord], docs_b: Sequence[DocRecord]) -> list[DocRecord]:
    """Return the documents of run b in the order of run a.

    They are paired by task and by the hashes of document, prompt and target; those alike in all four are paired in
    the order of `doc_id`.

    Raises:
        ComparisonError: when one of the runs has documents that the other has not.
    """
    keyed_a, keyed_b = _keyed(docs_a), _keyed(docs_b)
    if keyed_a.keys() != keyed_b.keys() or not keyed_a:
        raise ComparisonError(_mismatch(keyed_a.keys() - keyed_b.keys(), keyed_b.keys() - keyed_a.keys()))
    return [keyed_b[key] for key in keyed_a]


def _keyed(docs: Sequence[DocRecord]) -> dict[_Key, DocRecord]:
    """Return the documents in their order, each by its identity and its number among those of the same identity."""
    seen: Counter[_Key] = Counter()
    keys: dict[int, _Key] = {}
    for position in sorted(range(len(docs)), key=lambda i: docs[i].doc_id):
        identity = tuple(getattr(docs[position], name) for name in _IDENTITY)
        keys[position] = (*identity, seen[identity])
        seen[identity] += 1
    return {keys[position]: document for position, document in enumerate(docs)}


def _mismatch(only_a: set[_Key], only_b: set[_Key]) -> str:
    if not only_a | only_b:
        return "got no documents, expected the same ones in both runs; evaluate both first"
    tasks = [dict(Counter(key[0] for key in keys)) for keys in (only_a, only_b)]
    parts = [f"got {len(only_a)} documents only in run a {tasks[0]}, {len(only_b)} only in run b {tasks[1]}"]
    for i, name in enumerate(_IDENTITY):
        without_a, without_b = ({key[:i] + key[i + 1 :] for key in keys} for keys in (only_a, only_b))
        if alike := len(without_a & without_b):
            parts.append(f"{alike} of them differ in {name} alone")
    fix = "expected the same in both; evaluate both with the same tasks, shots, chat template and limit"
    return "; ".join([*parts, fix])
