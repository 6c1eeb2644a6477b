"""One measured arm compared with another: differences, verdicts, changed answers and bits per byte.

Scores of 0 to 1 become points on the way in, so that differences, intervals and margins all are in points.
Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Task to why it is not compared in points at all."""
    doubts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Task to the reasons why agreement in it means nothing."""
    base_scored: bool = True
    """Whether it is known what tuning did."""


def criteria_for(arms: Sequence[AlignedScores], margin: float) -> Criteria:
    """Choose the tasks of the verdict: right or wrong and other scores of 0 to 1; generations where that is all.

    The baseline is the first arm.

    Raises:
        ComparisonError: when no task has such scores, or one has too few documents.
    """
    reference, tasks = arms[0], arms[0].tasks
    limit = min((result.limit for result in tasks.values() if result.limit is not None), default=None)
    fewest = FEWEST_DOCUMENTS if limit is None else 2
    for task, documents in reference.results[0].documents.items():
        if len(documents) < fewest and tasks[task].kind != "bits_per_byte":
            raise ComparisonError(
                f"{task} has {len(documents)} documents, too few to say anything; expected at least {fewest}. Leave it "
                "out with --tasks, or evaluate more of it"
            )
    compared = [task for task in tasks if tasks[task].kind != "bits_per_byte"]
    left_out = {task: why for task in compared if (why := _incomparable(task, arms))}
    unit = [task for task in compared if task not in left_out]
    scored = [task for task in unit if tasks[task].kind in ("accuracy", "score")]
    generated = [task for task in unit if tasks[task].kind == "generation"]
    if not scored + generated:
        why = "".join(f" ({task}: {reason})" for task, reason in left_out.items())
        raise ComparisonError(
            f"the tasks {', '.join(tasks)} have no score between 0 and 1, and a verdict needs one{why}. Evaluate with "
            "--tasks standin_choice, mmlu or another of that kind"
        )
    return Criteria(margin, limit, scored or generated, generated if scored else [], left_out)


def _incomparable(task: str, arms: Sequence[AlignedScores]) -> str | None:
    scores = np.concatenate([arm.scores(task).ravel() for arm in arms])
    if scores.min() < 0 or scores.max() > 1:
        return f"its scores reach from {scores.min():g} to {scores.max():g}, expected 0 to 1"
    return None if arms[0].tasks[task].higher_is_better else "lower is better in it"


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
    if not (found.verdict == "equivalent" and unlike):  # +5 points in one task and -5 in another are no match
        unlike = {}
    trusted = [task for task in criteria.verdict if task not in criteria.doubts]
    rest = overall_difference(a, b, criteria, trusted) if trusted and criteria.doubts else None
    denied = criteria.doubts and not (rest and rest.verdict == "equivalent")
    if found.verdict == "equivalent" and (unlike or denied):
        found = replace(found, verdict="inconclusive")
    doubts = list(dict.fromkeys(reason for reasons in criteria.doubts.values() for reason in reasons))
    said = sentence(a.name, b.name, found, criteria.verdict, seeds, unlike=unlike, doubts=doubts, rest=rest)
    counts = _count_flips(a, b, seeds)
    return Contrast(
        name=a.name,
        baseline=b.name,
        sentence=" ".join([said, *_remarks(a, b, found, criteria)]),
        overall=found,
        tasks=tasks,
        flips=counts,
        changed=_changed_answers(a, b, seeds),
        changed_share=_changed_share(counts),
        bits=[_bits(task, a, b) for task, result in b.tasks.items() if result.kind == "bits_per_byte"],
        divergence=divergence,
        quantization_error=list(quantization_error),
        doubts=doubts,
    )


def _remarks(a: AlignedScores, b: AlignedScores, found: Comparison, criteria: Criteria) -> Iterator[str]:
    """Yield what a reader of the verdict must know of the scores it is made of."""
    tasks = criteria.verdict
    if found.verdict == "equivalent" and not criteria.base_scored:
        command = "qlora-recipes evaluate RUN --no_adapter"
        yield f"No base was scored, so it is not known whether tuning did anything: {command}."
    if all(np.array_equal(a.scores(task), b.scores(task)) for task in tasks):
        yield "Not one document is scored differently."
    if cut := sum(results.tasks[task].truncated for arm in (a, b) for results in arm.results for task in tasks):
        yield f"Cut or left out, because they did not fit into the model's context: {cut:,} requests."
    subjects = {task: {document.subject for document in b.documents(task)[0]} for task in tasks}
    if one := [task for task, named in subjects.items() if len(named) == 1 and named != {None}]:
        yield f"The documents of {', '.join(one)} are of one subject and taken for independent."
    for task, why in criteria.left_out.items():
        yield f"Left out is {task}: {why}."


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
    """Compare task by task.

    A task is *different* only where its p-value, adjusted over the tasks, is below 0.05, and *equivalent* only where
    agreement in it means something.
    """
    of_a, of_b = mean_scores(a, criteria), mean_scores(b, criteria)
    found = {task: overall_difference(a, b, criteria, [task]) for task in of_a}
    adjusted = holm({task: comparison.p_difference for task, comparison in found.items()})
    for task, p in adjusted.items():
        doubted = found[task].verdict == "equivalent" and task in criteria.doubts
        if doubted or (found[task].verdict == "different" and p >= 0.05):
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
