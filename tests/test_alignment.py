"""Documents of two runs are paired by what they are, and nothing is paired that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_runs import document

from qlora_recipes.comparison.evaluated import align
from qlora_recipes.errors import ComparisonError
from qlora_recipes.evaluation.records import DocRecord

DOCUMENTS = [document(i, float(i % 2), "mmlu") for i in range(4)]


def test_align_pairs_by_hashes_whatever_the_order() -> None:
    of_b = [replace(document, score=0.5 + i) for i, document in enumerate(DOCUMENTS)]
    aligned = align(DOCUMENTS, of_b[::-1])
    assert aligned == of_b
    assert [document.score for document in aligned] == [0.5, 1.5, 2.5, 3.5]


def test_align_pairs_the_same_document_given_twice_by_its_number() -> None:
    twice = [replace(DOCUMENTS[0], doc_id="7", score=1.0), replace(DOCUMENTS[0], doc_id="3", score=0.0)]
    of_b = [replace(DOCUMENTS[0], doc_id="3", score=0.25), replace(DOCUMENTS[0], doc_id="7", score=0.75)]
    assert [document.score for document in align(twice, of_b)] == [0.75, 0.25]


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
    ],
)
def test_align_refuses_a_mismatch_and_names_it(of_b: Sequence[DocRecord], said: str) -> None:
    with pytest.raises(ComparisonError, match=said):
        align(DOCUMENTS, of_b)


def test_align_refuses_two_empty_runs() -> None:
    with pytest.raises(ComparisonError, match="got no documents"):
        align([], [])
