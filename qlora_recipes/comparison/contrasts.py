"""One measured arm held against another: differences, verdicts, flips and bits per byte.

Scores of 0 to 1 become points on the way in, so that differences, intervals and margins all are in points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_recipes.comparison.changes import changed_answers, changed_share, count_flips
from qlora_recipes.comparison.evaluated import AlignedScores
from qlora_recipes.comparison.findings import BitsContrast, Contrast, TaskContrast
from qlora_recipes.comparison.paired import (
    FEWEST_TEXTS,
    Comparison,
    TaskScores,
    bits_per_byte_difference,
    compare,
    holm,
    overall,
)
from qlora_recipes.comparison.sentences import sentence
from qlora_recipes.errors import ComparisonError

POINTS = 100


@dataclass(frozen=True)
class Criteria:
    """What every contrast of a report is judged by."""

    margin: float
    """Points."""
    limited: bool
    verdict: Sequence[str]
    """Tasks that the overall verdict is over."""
    beside: Sequence[str]
    """Other tasks whose differences are shown in points."""


def criteria(reference: AlignedScores, margin: float) -> Criteria:
    """Choose the tasks of the verdict: right or wrong and other scores of 0 to 1; generations where that is all.

    Raises:
        ComparisonError: when no task has such scores.
    """
    tasks = reference.results[0].tasks
    unit = [task for task in tasks if reference.scores(task).min() >= 0 and reference.scores(task).max() <= 1]
    scored = [task for task in unit if tasks[task].kind in ("accuracy", "score")]
    generated = [task for task in unit if tasks[task].kind == "generation"]
    if not scored + generated:
        raise ComparisonError(
            f"the tasks {', '.join(tasks)} have no score between 0 and 1, and a verdict needs one. Evaluate with "
            "--tasks standin_choice, mmlu or another of that kind"
        )
    limited = any(result.limit is not None for result in tasks.values())
    return Criteria(margin, limited, scored or generated, generated if scored else [])


def mean_scores(measured: AlignedScores, by: Criteria) -> dict[str, float]:
    """Return task to score in points, the mean over documents and seeds."""
    return {task: float(POINTS * measured.scores(task).mean()) for task in (*by.verdict, *by.beside)}


def contrast(a: AlignedScores, b: AlignedScores, seeds: Sequence[int], by: Criteria) -> Contrast:
    """Hold an arm `a` against its baseline `b`, over all their seeds."""
    found = overall_difference(a, b, by)
    counts = count_flips(a, b, seeds)
    return Contrast(
        name=a.name,
        baseline=b.name,
        sentence=sentence(a.name, b.name, found, by.verdict, seeds),
        overall=found,
        tasks=_task_contrasts(a, b, by),
        flips=counts,
        changed=changed_answers(a, b, seeds),
        changed_share=changed_share(counts),
        bits=[_bits(task, a, b) for task, result in b.results[0].tasks.items() if result.kind == "bits_per_byte"],
        divergence=None,
        quantization_error=[],
    )


def overall_difference(a: AlignedScores, b: AlignedScores, by: Criteria) -> Comparison:
    """Compare over the tasks of the verdict, each counting the same."""
    return overall({task: _scores(a, b, task) for task in by.verdict}, margin=by.margin, limited=by.limited)


def _scores(a: AlignedScores, b: AlignedScores, task: str) -> TaskScores:
    subjects = [document.subject for document in b.results[0].documents[task]]
    clusters = subjects if len(set(subjects)) > 1 else None
    return TaskScores(POINTS * a.scores(task), POINTS * b.scores(task), clusters)


def _task_contrasts(a: AlignedScores, b: AlignedScores, by: Criteria) -> list[TaskContrast]:
    found = {}
    for task in (*by.verdict, *by.beside):
        scores = _scores(a, b, task)
        found[task] = compare(scores.a, scores.b, margin=by.margin, clusters=scores.clusters, limited=by.limited)
    adjusted = holm({task: comparison.p_difference for task, comparison in found.items()})
    of_a, of_b = mean_scores(a, by), mean_scores(b, by)
    return [
        TaskContrast(task, b.task(task).metric, of_a[task], of_b[task], comparison, adjusted[task])
        for task, comparison in found.items()
    ]


def _bits(task: str, a: AlignedScores, b: AlignedScores) -> BitsContrast:
    of_a, of_b = (
        np.mean([[document.bits for document in seed.documents[task]] for seed in one.results], axis=0, dtype=float)
        for one in (a, b)
    )
    sizes = np.array([document.bytes for document in b.results[0].documents[task]], dtype=float)
    found = bits_per_byte_difference(of_a, of_b, sizes) if len(sizes) >= FEWEST_TEXTS else None
    return BitsContrast(task, float(of_a.sum() / sizes.sum()), float(of_b.sum() / sizes.sum()), found)
