"""ROUGE-L and chrF as `evaluate.Metric`s that need no hub: `evaluate.load` fetches its code from there.

The arithmetic is rouge_score's and sacrebleu's.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

_TEXTS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})


class RougeL(evaluate.Metric):
    """F-measure of the longest common subsequence of words, from 0 to 1.

    rouge_score's own words: runs of the letters a to z and digits, in lower case. Texts in other scripts have none and
    score 0; chrF is for them.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE-L, the mean over documents, and each document's own.",
            citation="Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004",
            inputs_description="predictions and references: one text each",
            features=_TEXTS,
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        scorer = RougeScorer(["rougeL"])
        pairs = zip(references, predictions, strict=True)
        scores = [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference, prediction in pairs]
        return {"rougeL": sum(scores) / len(scores), "documents": scores}


class ChrF(evaluate.Metric):
    """Agreement in runs of up to six characters, from 0 to 100; for every script."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="chrF over all documents, and each document's own.",
            citation="Popović, chrF: character n-gram F-score for automatic MT evaluation, 2015",
            inputs_description="predictions and references: one text each",
            features=_TEXTS,
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        chrf = CHRF()
        pairs = zip(predictions, references, strict=True)
        return {
            "chrf": chrf.corpus_score(predictions, [references]).score,
            "documents": [chrf.sentence_score(prediction, [reference]).score for prediction, reference in pairs],
        }
