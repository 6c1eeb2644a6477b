"""ROUGE-L, BLEU and chrF: the figures of rouge_score and sacrebleu, without a hub."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf, sentence_chrf

from qlora_recipes.evaluation.text_metrics import Bleu, ChrF, RougeL

PREDICTIONS = ["In Kropa.", "the cat sat on a mat", "", "ça va bien", "Ответ: сорок два"]
REFERENCES = ["In Kropa.", "a cat sat on the mat", "words", "ça va très bien", "сорок два"]


def test_rouge_l_is_rouge_scores() -> None:
    found = RougeL(keep_in_memory=True).compute(predictions=PREDICTIONS, references=REFERENCES)
    scorer = RougeScorer(["rougeL"])
    own = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert found["documents"] == own
    assert found["rougeL"] == pytest.approx(sum(own) / len(own))
    assert own[0] == 1 and 0 < own[1] < 1


def test_chrf_is_sacrebleus() -> None:
    found = ChrF(keep_in_memory=True).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found["chrf"] == corpus_chrf(PREDICTIONS, [REFERENCES]).score
    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    assert found["documents"] == [sentence_chrf(p, [r]).score for p, r in pairs]


def test_bleu_is_sacrebleus() -> None:
    predictions, references = ["the cat sat on the mat today", *PREDICTIONS], ["the cat sat on the mat", *REFERENCES]
    found = Bleu(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert found["bleu"] == corpus_bleu(predictions, [references]).score
    assert 0 < found["bleu"] < 100


def test_chrf_reads_scripts_that_rouge_does_not() -> None:
    russian = dict(predictions=[PREDICTIONS[-1]], references=[REFERENCES[-1]])
    assert RougeL(keep_in_memory=True).compute(**russian)["rougeL"] == 0
    assert ChrF(keep_in_memory=True).compute(**russian)["chrf"] > 50
