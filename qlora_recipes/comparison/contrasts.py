"""One measured arm compared with another: differences, verdicts, changed answers and bits per byte.

Scores of 0 to 1 become points on the way in, so that differences, intervals and margins all are in points.
Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest

import numpy as np

from qlora_recipes.comparison.evaluated import AlignedScores
from qlora_recipes.comparison.findings import BitsContrast, ChangedAnswer, Contrast, FlipCount, TaskContrast
from qlora_recipes.comparison.paired import (
    FEWEST_TEXTS,
    Comparison,
    TaskScores,
    bits_per_byte_difference,
    flips,
    holm,
    overall,
)
from qlora_recipes.comparison.sentences import sentence
from qlora_recipes.errors import ComparisonError
from qlora_recipes.evaluation.records import Divergence, LayerError

FEWEST_DOCUMENTS = 20
"""Fewer per task leave an interval of some 20 points at best, which supports no verdict."""
POINTS = 100
SHOWN = 5
"""Changed answers shown of each kind."""
_KINDS = {(1.0, 0.0): "right to wrong", (0.0, 1.0): "wrong to right", (0.0, 0.0): "wrong to other wrong"}


@dataclass(frozen=True)
class Criteria:
    """What every contrast of a report is judged by."""

    margin: float
    """Points."""
    limit: int | None
    """Documents per task that the evaluation was limited to."""
    verdict: Sequence[str]
    """Tasks that the overall verdict is over."""
    secondary: Sequence[str]
    """Other tasks whose differences are shown in points."""


def criteria_for(reference: AlignedScores, margin: float) -> Criteria:
    """Choose the tasks of the verdict: right or wrong and other scores of 0 to 1; generations where that is all.

    Raises:
        ComparisonError: when no task has such scores, or one has too few documents.
    """
    tasks = reference.tasks
    limit = min((result.limit for result in tasks.values() if result.limit is not None), default=None)
    fewest = FEWEST_DOCUMENTS if limit is None else 2
    for task, documents in reference.results[0].documents.items():
        if len(documents) < fewest and tasks[task].kind != "bits_per_byte":
            raise ComparisonError(
                f"{task} has {len(documents)} documents, too few to say anything; expected at least {fewest}. Leave it "
                "out with --tasks, or evaluate more of it"
            )
    unit = [task for task in tasks if reference.scores(task).min() >= 0 and reference.scores(task).max() <= 1]
    scored = [task for task in unit if tasks[task].kind in ("accuracy", "score")]
    generated = [task for task in unit if tasks[task].kind == "generation"]
    if not scored + generated:
        raise ComparisonError(
            f"the tasks {', '.join(tasks)} have no score between 0 and 1, and a verdict needs one. Evaluate with "
            "--tasks standin_choice, mmlu or another of that kind"
        )
    return Criteria(margin, limit, scored or generated, generated if scored else [])


def mean_scores(aligned: AlignedScores, criteria: Criteria) -> dict[str, float]:
    """Return task to score in points, the mean over documents and seeds."""
    return {task: float(POINTS * aligned.scores(task).mean()) for task in (*criteria.verdict, *criteria.secondary)}


def contrast(
    a: AlignedScores,
    b: AlignedScores,
    seeds: Sequence[int],
    criteria: Criteria,
    divergence: Divergence | None = None,
    quantization_error: Sequence[LayerError] = (),
) -> Contrast:
    """Compare an arm `a` with its baseline `b`, over all their seeds."""
    found, tasks = overall_difference(a, b, criteria), _task_contrasts(a, b, criteria)
    unlike = {each.task: each.comparison.difference for each in tasks if each.comparison.verdict == "different"}
    unlike = {task: difference for task, difference in unlike.items() if task in criteria.verdict}
    if found.verdict == "equivalent" and unlike:  # +5 points in one task and -5 in another are no match
        found = replace(found, verdict="inconclusive")
    else:
        unlike = {}
    counts = _count_flips(a, b, seeds)
    return Contrast(
        name=a.name,
        baseline=b.name,
        sentence=sentence(a.name, b.name, found, criteria.verdict, seeds, unlike),
        overall=found,
        tasks=tasks,
        flips=counts,
        changed=_changed_answers(a, b, seeds),
        changed_share=_changed_share(counts),
        bits=[_bits(task, a, b) for task, result in b.tasks.items() if result.kind == "bits_per_byte"],
        divergence=divergence,
        quantization_error=list(quantization_error),
    )


def overall_difference(
    a: AlignedScores, b: AlignedScores, criteria: Criteria, tasks: Sequence[str] | None = None
) -> Comparison:
    """Compare over some tasks, or those of the verdict, each counting the same."""
    scores = {}
    for task in tasks or criteria.verdict:
        subjects = [document.subject for document in b.documents(task)[0]]
        clusters = subjects if len(set(subjects)) > 1 else None
        texts = [document.doc_hash for document in b.documents(task)[0]]
        scores[task] = TaskScores(POINTS * a.scores(task), POINTS * b.scores(task), clusters, texts)
    return overall(scores, margin=criteria.margin, limited=criteria.limit is not None)


def _task_contrasts(a: AlignedScores, b: AlignedScores, criteria: Criteria) -> list[TaskContrast]:
    """Compare task by task; a task is *different* only where its p-value, adjusted over the tasks, is below 0.05."""
    of_a, of_b = mean_scores(a, criteria), mean_scores(b, criteria)
    found = {task: overall_difference(a, b, criteria, [task]) for task in of_a}
    adjusted = holm({task: comparison.p_difference for task, comparison in found.items()})
    for task, p in adjusted.items():
        if found[task].verdict == "different" and p >= 0.05:
            found[task] = replace(found[task], verdict="inconclusive")
    return [
        TaskContrast(task, b.tasks[task].metric, of_a[task], of_b[task], comparison, adjusted[task])
        for task, comparison in found.items()
    ]


def _bits(task: str, a: AlignedScores, b: AlignedScores) -> BitsContrast:
    of_a, of_b = (arm.scores(task, of="bits").mean(axis=0) for arm in (a, b))
    sizes = np.array([document.bytes for document in b.documents(task)[0]], dtype=float)
    found = bits_per_byte_difference(of_a, of_b, sizes) if len(sizes) >= FEWEST_TEXTS else None
    return BitsContrast(task, float(of_a.sum() / sizes.sum()), float(of_b.sum() / sizes.sum()), found)


def _right_or_wrong(aligned: AlignedScores) -> list[str]:
    return [task for task, result in aligned.tasks.items() if result.kind == "accuracy"]


def _count_flips(a: AlignedScores, b: AlignedScores, seeds: Sequence[int]) -> list[FlipCount]:
    """Count the flips of every task whose documents are right or wrong, for each seed."""
    counts = []
    for task in _right_or_wrong(b):
        for seed, of_a, of_b in zip(seeds, a.documents(task), b.documents(task), strict=True):
            scores = ([document.score for document in documents] for documents in (of_a, of_b))
            answers = ([document.answer for document in documents] for documents in (of_a, of_b))
            counts.append(FlipCount(task, seed, flips(*scores, *answers)))
    return counts


def _changed_share(counts: Sequence[FlipCount]) -> float | None:
    """Return how many of 100 documents are right in one arm and wrong in the other; None where none can be."""
    documents = sum(count.flips.n for count in counts)
    changed = sum(count.flips.right_to_wrong + count.flips.wrong_to_right for count in counts)
    return 100 * changed / documents if documents else None


def _changed_answers(a: AlignedScores, b: AlignedScores, seeds: Sequence[int]) -> list[ChangedAnswer]:
    """Return some of the documents that were answered differently, as many of each kind, from all tasks in turn."""
    by_task = [list(_changes(task, a, b, seeds)) for task in _right_or_wrong(b)]
    in_turn = [change for change in chain.from_iterable(zip_longest(*by_task)) if change is not None]
    return [change for kind in _KINDS.values() for change in islice((c for c in in_turn if c.change == kind), SHOWN)]


def _changes(task: str, a: AlignedScores, b: AlignedScores, seeds: Sequence[int]) -> Iterator[ChangedAnswer]:
    for seed, of_a, of_b in zip(seeds, a.documents(task), b.documents(task), strict=True):
        for one, other in zip(of_a, of_b, strict=True):
            kind = _KINDS.get((other.score, one.score))
            if kind and one.answer != other.answer:
                yield ChangedAnswer(
                    task, one.subject, one.doc_id, seed, kind, one.prompt, one.target, other.answer, one.answer
                )
