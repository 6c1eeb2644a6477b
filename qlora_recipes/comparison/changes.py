"""Answers that changed from the baseline to an arm: how many, in which direction, and a sample of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest

from qlora_recipes.comparison.evaluated import AlignedScores
from qlora_recipes.comparison.findings import ChangedAnswer, FlipCount
from qlora_recipes.comparison.paired import Flips, flips
from qlora_recipes.evaluation.records import DocRecord

SHOWN = 5
"""Changed answers shown of each kind."""
_KINDS = {(1.0, 0.0): "right to wrong", (0.0, 1.0): "wrong to right", (0.0, 0.0): "wrong to other wrong"}


def count_flips(a: AlignedScores, b: AlignedScores, seeds: Sequence[int]) -> list[FlipCount]:
    """Count the flips of every task whose documents are right or wrong, for each seed."""
    return [
        FlipCount(task, seed, _flips(_documents(a, i, task), _documents(b, i, task)))
        for task in _right_or_wrong(b)
        for i, seed in enumerate(seeds)
    ]


def _right_or_wrong(measured: AlignedScores) -> list[str]:
    return [task for task, result in measured.results[0].tasks.items() if result.kind == "accuracy"]


def _documents(measured: AlignedScores, seed: int, task: str) -> Sequence[DocRecord]:
    return measured.results[seed].documents[task]


def _flips(a: Sequence[DocRecord], b: Sequence[DocRecord]) -> Flips:
    return flips(
        [document.score for document in a],
        [document.score for document in b],
        [document.answer for document in a],
        [document.answer for document in b],
    )


def changed_share(counts: Sequence[FlipCount]) -> float | None:
    """Return how many of 100 documents are right in one arm and wrong in the other; None where none can be."""
    documents = sum(count.flips.n for count in counts)
    changed = sum(count.flips.right_to_wrong + count.flips.wrong_to_right for count in counts)
    return 100 * changed / documents if documents else None


def changed_answers(a: AlignedScores, b: AlignedScores, seeds: Sequence[int]) -> list[ChangedAnswer]:
    """Return some of the documents that were answered differently, of each kind as many, from all tasks in turn."""
    by_task = [list(_changes(task, a, b, seeds)) for task in _right_or_wrong(b)]
    in_turn = [change for change in chain.from_iterable(zip_longest(*by_task)) if change is not None]
    return [change for kind in _KINDS.values() for change in islice((c for c in in_turn if c.change == kind), SHOWN)]


def _changes(task: str, a: AlignedScores, b: AlignedScores, seeds: Sequence[int]) -> Iterator[ChangedAnswer]:
    for i, seed in enumerate(seeds):
        for one, other in zip(_documents(a, i, task), _documents(b, i, task), strict=True):
            kind = _KINDS.get((other.score, one.score))
            if kind and one.answer != other.answer:
                yield ChangedAnswer(
                    task, one.subject, one.doc_id, seed, kind, one.prompt, one.target, other.answer, one.answer
                )
