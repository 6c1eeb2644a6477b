"""Agreement that means nothing is never called a match: arms that guess, give one answer, or learned nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_runs import make_run, receipt, write_results

from qlora_recipes.comparison.findings import Contrast
from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.evaluation.records import DocRecord

N = 1531  # the questions of a report that "nf4 matches bf16" was said of two models that answered A
RNG = np.random.default_rng(0)
RIGHT = RNG.integers(0, 4, N)
ONE_LETTER, ITS_TWIN = np.zeros(N, int), np.zeros(N, int)
ONE_LETTER[7] = 2
ITS_TWIN[[20, 300, 301, 700, 800, 1500]] = 1
READS = np.where(RNG.uniform(size=N) < 0.7, RIGHT, (RIGHT + 1) % 4)
READS_TOO = READS.copy()
READS_TOO[:4] = RIGHT[:4]
TASK = "standin_choice"


def asked(picks: np.ndarray, right: np.ndarray, *, letters: bool = True, **changes: object):
    """Turn documents into questions of four choices, answered with the picks."""

    def change(document: DocRecord) -> DocRecord:
        i = int(document.doc_id)
        texts = ["ABCD"[k] if letters else f"choice {k} of {i}" for k in (picks[i], right[i])]
        return replace(document, choices=4, picked=int(picks[i]), answer=texts[0], target=texts[1], **changes)

    return change


def compared(
    root: Path,
    baseline: np.ndarray,
    arm: np.ndarray,
    base: np.ndarray | None = None,
    *,
    right: np.ndarray = RIGHT,
    margin: float = 2.0,
    **changes: object,
) -> Contrast:
    """An nf4 run and its baseline by what they picked, with the base before tuning where it was scored."""
    runs = []
    for precision, picks in (("nf4", arm), ("bf16", baseline)):
        scores = (picks == right).astype(float)
        runs.append(make_run(root, precision, scores=scores, change=asked(picks, right, **changes), text=False))
    if base is not None:
        folder, scores = runs[1] / "evaluation" / "base", (base == right).astype(float)
        write_results(
            folder, receipt("bf16", 0), scores, adapter=False, text=False, change=asked(base, right, **changes)
        )
    return compare_folders(runs, margin).contrasts[0]


@pytest.mark.parametrize("letters", [True, False])
def test_two_models_that_answer_one_letter_are_no_match(tmp_path: Path, letters: bool) -> None:
    found = compared(tmp_path, ONE_LETTER, ITS_TWIN, margin=1.0, letters=letters)
    answer = "'A'" if letters else "its choice 1"
    assert found.overall.interval_inside_margin and found.overall.p_equivalence < 0.001
    assert found.overall.verdict == found.tasks[0].comparison.verdict == "inconclusive"
    assert found.sentence.startswith(
        "nf4 and bf16 agree, but the agreement means nothing: "
        f"bf16 answers standin_choice with {answer} in 1,530 of 1,531 documents"
    )
    assert "bf16 is not above chance in standin_choice, with 2" in found.sentence
    assert "where guessing gets 25.0 %" in found.sentence
    assert "matches" not in found.sentence
    assert len(found.doubts) == 2


def test_guesses_that_agree_are_no_match(tmp_path: Path) -> None:
    guesses = np.random.default_rng(1).integers(0, 4, N)
    found = compared(tmp_path, guesses, guesses)
    assert found.overall.verdict == "inconclusive"
    (doubt,) = found.doubts
    assert doubt.startswith("bf16 is not above chance in standin_choice")
    assert found.sentence.endswith("Not one document is scored differently.")


def test_a_baseline_that_reads_its_questions_is_matched(tmp_path: Path) -> None:
    found = compared(tmp_path, READS, READS_TOO, ONE_LETTER)
    assert found.overall.verdict == "equivalent" and not found.doubts
    assert found.sentence.startswith("nf4 matches bf16")
    assert "No base was scored" not in found.sentence


def test_a_task_with_one_right_answer_is_not_accused(tmp_path: Path) -> None:
    mostly_a = np.where(np.arange(N) % 25 == 0, 1, 0)  # 96 %
    answered = mostly_a.copy()
    answered[np.flatnonzero(mostly_a)[:20]] = 0
    found = compared(tmp_path, answered, answered, RIGHT, right=mostly_a)
    assert np.mean(answered == 0) > 0.95
    assert found.overall.verdict == "equivalent" and not found.doubts


def test_a_graded_answer_is_not_called_wrong(tmp_path: Path) -> None:
    scores = np.where(np.arange(400) % 2, 0.4, 0.6)
    runs = [make_run(tmp_path, name, scores=scores, kind="score", text=False) for name in ("nf4", "bf16")]
    (doubt,) = compare_folders(runs, 1.0).contrasts[0].doubts
    assert doubt.endswith("in 400 of 400 documents, which has less than a full score in 400 of them")


def test_a_baseline_like_its_untuned_base_is_no_match(tmp_path: Path) -> None:
    found = compared(tmp_path, READS, READS_TOO, READS)
    assert found.overall.verdict == "inconclusive"
    assert "agreement means nothing: tuning itself made no difference that these tasks can see" in found.sentence


def test_without_a_scored_base_a_match_says_so(tmp_path: Path) -> None:
    found = compared(tmp_path, READS, READS_TOO)
    assert found.overall.verdict == "equivalent"
    assert found.sentence.endswith(
        "No base was scored, so it is not known whether tuning did anything: qlora-recipes evaluate RUN --no_adapter."
    )


def test_a_difference_from_guesses_is_still_one(tmp_path: Path) -> None:
    found = compared(tmp_path, ONE_LETTER, READS)
    assert found.overall.verdict == "different"
    assert "Agreement of these arms would mean nothing: bf16 answers standin_choice with 'A'" in found.sentence


def two_tasks(root: Path, arm: np.ndarray, margin: float) -> Contrast:
    """A task at chance in both arms beside one that the baseline reads."""
    runs = []
    for precision, picks in (("nf4", arm), ("bf16", READS)):
        runs.append(make_run(root, precision))
        for task, of_task in (("guessed", ONE_LETTER), ("read", picks)):
            write_results(
                runs[-1] / "evaluation",
                receipt(precision, 0),
                (of_task == RIGHT).astype(float),
                task=task,
                text=False,
                change=asked(of_task, RIGHT),
            )
    return compare_folders(runs, margin).contrasts[0]


def test_a_task_at_chance_does_not_dilute_a_loss(tmp_path: Path) -> None:
    worse, held, missed = READS.copy(), np.flatnonzero(READS == RIGHT), np.flatnonzero(READS != RIGHT)
    worse[held[:25]] = (RIGHT[held[:25]] + 1) % 4
    worse[missed[:17]] = RIGHT[missed[:17]]
    found = two_tasks(tmp_path, worse, 1.0)
    assert found.overall.interval_inside_margin
    assert found.overall.verdict == "inconclusive"
    assert "In the other tasks the difference is −0.52 points" in found.sentence  # noqa: RUF001


def test_a_match_holds_without_the_task_at_chance(tmp_path: Path) -> None:
    found = two_tasks(tmp_path, READS_TOO, 2.0)
    verdicts: Sequence[str] = [task.comparison.verdict for task in found.tasks]
    assert (found.overall.verdict, verdicts) == ("equivalent", ["inconclusive", "equivalent"])
    assert "Without the tasks where agreement means nothing it is" in found.sentence
