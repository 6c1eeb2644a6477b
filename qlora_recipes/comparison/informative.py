"""Could these scores have shown a difference? Why agreement of two arms would mean nothing, task by task.

Two arms that guess agree, as do two that always give the same answer, or whose adapters learned nothing.
Knows nothing of verdicts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qlora_recipes.comparison.contrasts import POINTS, Criteria
from qlora_recipes.comparison.evaluated import AlignedScores
from qlora_recipes.comparison.paired import Comparison, compare
from qlora_recipes.comparison.sentences import interval, points
from qlora_recipes.evaluation.records import DocRecord
from qlora_recipes.run.differences import shortened

ONE_ANSWER = 0.95
"""Share of the documents that get one answer, from which on a model is taken to give no other."""
WRONG = 0.05
"""Share of the documents where that answer is wrong; below it the task may have no other right answer to find."""


def doubts(arms: Sequence[AlignedScores], tuning: Comparison | None, criteria: Criteria) -> Mapping[str, Sequence[str]]:
    """Return task to the reasons why agreement in it means nothing; the baseline is the first arm.

    `tuning` compares the baseline with its base before tuning. What casts no doubt on any task is left out.
    """
    of_all = list(_of_tuning(tuning))
    found = {task: [*_of_task(arms, task), *of_all] for task in criteria.verdict}
    return {task: reasons for task, reasons in found.items() if reasons}


def _of_tuning(tuning: Comparison | None) -> Iterator[str]:
    if tuning is not None and tuning.interval_95[0] <= 0 <= tuning.interval_95[1]:
        yield (
            f"tuning itself made no difference that these tasks can see, {points(tuning.difference)} (95 % interval "
            f"{interval(tuning.interval_95)}), and adapters that learned nothing agree in any precision"
        )


def _of_task(arms: Sequence[AlignedScores], task: str) -> Iterator[str]:
    baseline = arms[0]
    scores = {float(score) for arm in arms for score in arm.scores(task).flat}
    if len(scores) == 1:
        extreme = "wrong" if scores == {0.0} else "right" if scores == {1.0} else "scored the same"
        yield f"{task} cannot tell the arms apart: every answer of every arm is {extreme}"
        return
    of_seeds = (_one_answer(documents) for documents in baseline.documents(task))
    if one := next((said for said in of_seeds if said), None):
        yield f"{baseline.name} answers {task} with {one}"
    yield from _of_chance(baseline, task)


def _of_chance(baseline: AlignedScores, task: str) -> Iterator[str]:
    documents = baseline.documents(task)[0]
    choices = [document.choices for document in documents if document.choices]
    if len(choices) < len(documents):  # not multiple choice: what guessing gets is not known
        return
    scores, chance = POINTS * baseline.scores(task).mean(axis=0), POINTS / np.array(choices)
    subjects = [document.subject for document in documents]
    clusters = subjects if len(set(subjects)) > 1 else None
    low, high = compare(scores, chance, margin=1.0, clusters=clusters).interval_95
    if low <= 0:
        guessed = float(chance.mean())
        yield (
            f"{baseline.name} is not above chance in {task}, with {scores.mean():.1f} % right (95 % interval "
            f"{max(guessed + low, 0):.1f} to {min(guessed + high, POINTS):.1f}) where guessing gets {guessed:.1f} %"
        )


def _one_answer(documents: Sequence[DocRecord]) -> str | None:
    """Say which answer nearly every document gets, where it is wrong often enough for others to be missed."""
    places = all(document.picked is not None for document in documents)
    given = [document.picked if places else document.answer for document in documents]
    (answer, number), *_ = Counter(given).most_common(1)
    alike = [document for document, each in zip(documents, given, strict=True) if each == answer]
    wrong = sum(document.score < 1 for document in alike)
    if answer == "" and all(document.target == "" for document in documents):  # only scored: there are no answers
        return None
    if number < ONE_ANSWER * len(documents) or wrong < WRONG * len(documents):
        return None
    texts = {document.answer for document in alike}
    shown = shortened(repr(texts.pop()), 40) if len(texts) == 1 else f"its choice {int(answer or 0) + 1}"
    judged = "is wrong in" if {document.score for document in documents} <= {0, 1} else "has less than a full score in"
    return f"{shown} in {number:,} of {len(documents):,} documents, which {judged} {wrong:,} of them"
