"""Scores that no verdict should be made of: each is one clear error, or is told in the sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import answers, flipped, make_run, write_results

from qlora_recipes.comparison.findings import Contrast
from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.errors import ComparisonError
from qlora_recipes.evaluation.records import DocRecord
from qlora_recipes.run.folder import RunFolder

N = 400
SCORES = answers(N)
BRIER = dict(task="brier", kind="score", metric="brier", higher_is_better=False)
CHRF = dict(task="chrf", kind="score", metric="chrf")


def compared(root: Path, of_arm: dict[str, Any], of_both: dict[str, Any], *more: dict[str, Any]) -> Contrast:
    """An nf4 run and its baseline; `more` are further tasks, each with `scores`."""
    for precision, options in (("nf4", of_both | of_arm), ("bf16", of_both)):
        run = make_run(root, precision, **{"scores": SCORES, "text": False, **options})
        for task in more:
            write_results(run / "evaluation", RunFolder(run).receipt(), **{"text": False, **task})
    return compare_folders(sorted(root.iterdir()), 2.0).contrasts[0]


def other(document: DocRecord) -> DocRecord:
    return replace(document, doc_hash=f"another {document.doc_id}")


@pytest.mark.parametrize(
    ("of_arm", "of_both", "said"),
    [
        ({}, {"scores": []}, "standin_choice in .*: got no documents, expected the same ones in both runs"),
        ({}, {"scores": [], "kind": "bits_per_byte"}, "standin_choice in .*: got no documents"),
        ({}, {"scores": [1.0]}, "standin_choice has 1 documents, too few to say anything"),
        ({}, {"scores": [1.0], "limit": 1}, "standin_choice has 1 documents, too few .* expected at least 2"),
        ({}, {"scores": 50 * SCORES}, "document .* of standin_choice has the score 50, expected 0 for wrong or 1"),
        ({}, {"scores": SCORES - 1}, "has the score -1, expected 0 for wrong or 1 for right"),
        (
            {},
            {"scores": 50 * SCORES, **CHRF},
            r"have no score between 0 and 1.* \(chrf: its scores reach from 0 to 50, expected 0 to 1\)",
        ),
        (
            {"scores": np.r_[SCORES[1:], 1.5]},
            {"kind": "score"},
            r"standin_choice: its scores reach from 0 to 1\.5, expected 0 to 1",
        ),
        ({}, {"scores": SCORES / 2, **BRIER}, r"\(brier: lower is better in it\)"),
        ({"change": other}, {}, "got 400 documents only in run a .*400 of them differ in doc_hash alone"),
    ],
)
def test_scores_that_no_verdict_can_be_made_of_are_refused(
    tmp_path: Path, of_arm: dict[str, Any], of_both: dict[str, Any], said: str
) -> None:
    with pytest.raises(ComparisonError, match=said):
        compared(tmp_path, of_arm, of_both)


@pytest.mark.parametrize(
    ("of_arm", "of_both", "said"),
    [
        ({}, {}, "Not one document is scored differently."),
        ({}, {"scores": np.ones(N)}, "standin_choice cannot tell the arms apart: every answer of every arm is right"),
        ({}, {"scores": np.full(N, 0.5), "kind": "score"}, "every answer of every arm is scored the same"),
        ({"truncated": 7}, {"truncated": 5}, "did not fit into the model's context: 12 requests."),
        (
            {},
            {"change": lambda document: replace(document, subject="anatomy")},
            "The documents of standin_choice are of one subject and taken for independent.",
        ),
    ],
)
def test_scores_that_say_less_are_told_in_the_sentence(
    tmp_path: Path, of_arm: dict[str, Any], of_both: dict[str, Any], said: str
) -> None:
    assert said in compared(tmp_path, of_arm, of_both).sentence


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ({**CHRF, "scores": 90 * SCORES}, "Left out is chrf: its scores reach from 0 to 90, expected 0 to 1."),
        ({**BRIER, "scores": SCORES / 2}, "Left out is brier: lower is better in it."),
    ],
)
def test_a_task_that_cannot_be_compared_in_points_is_left_out_and_named(
    tmp_path: Path, task: dict[str, Any], why: str
) -> None:
    found = compared(tmp_path, {"scores": flipped(SCORES, 2, 1)}, {}, task)
    assert [row.task for row in found.tasks] == ["standin_choice"]
    assert why in found.sentence
