"""Documents of two runs are paired by what they are, and nothing is paired that differs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from qlora_recipes.comparison.alignment import align
from qlora_recipes.errors import ComparisonError


@dataclass(frozen=True)
class Document:
    task: str = "mmlu"
    doc_hash: str = "d"
    prompt_hash: str = "p"
    target_hash: str = "t"
    score: float = 1.0
    doc_id: int = 0


DOCUMENTS = [Document(doc_hash=f"d{i}", doc_id=i, score=i % 2) for i in range(4)]


def test_align_pairs_by_hashes_whatever_the_order() -> None:
    of_b = [replace(document, score=0.5 + i) for i, document in enumerate(DOCUMENTS)]
    aligned = align(DOCUMENTS, of_b[::-1])
    assert aligned.scores_a.tolist() == [0, 1, 0, 1]
    assert aligned.scores_b.tolist() == [0.5, 1.5, 2.5, 3.5]
    assert aligned.b == tuple(of_b)
    assert aligned.tasks == ("mmlu",) * 4
    mappings = align([vars(document) for document in DOCUMENTS], of_b)
    assert mappings.scores_b.tolist() == aligned.scores_b.tolist()


def test_align_pairs_the_same_document_given_twice_by_its_number() -> None:
    twice = [Document(doc_id=7, score=1), Document(doc_id=3, score=0)]
    aligned = align(twice, [Document(doc_id=3, score=0.25), Document(doc_id=7, score=0.75)])
    assert aligned.scores_a.tolist() == [1, 0]
    assert aligned.scores_b.tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("of_b", "said"),
    [
        (DOCUMENTS[:3], r"1 documents only in run a \{'mmlu': 1\}, 0 only in run b"),
        ([*DOCUMENTS, DOCUMENTS[0]], "0 documents only in run a"),
        ([replace(d, prompt_hash="other") for d in DOCUMENTS], "4 of them differ in prompt_hash alone"),
        (
            [replace(d, target_hash="other") for d in DOCUMENTS[:1]] + DOCUMENTS[1:],
            "1 of them .* target_hash",
        ),
        ([replace(d, task="arc") for d in DOCUMENTS], "4 of them differ in task alone"),
        (
            [replace(d, score=float("nan")) for d in DOCUMENTS],
            "score nan for document 0 of task mmlu in run b",
        ),
        ([{"task": "mmlu"}], "without doc_hash"),
    ],
)
def test_align_refuses_a_mismatch_and_names_it(of_b: list[object], said: str) -> None:
    with pytest.raises(ComparisonError, match=said):
        align(DOCUMENTS, of_b)


def test_align_refuses_two_empty_runs() -> None:
    with pytest.raises(ComparisonError, match="got no documents"):
        align([], [])
