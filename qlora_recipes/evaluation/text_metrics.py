"""ROUGE, BLEU and chrF of answers in words, by the libraries. Knows nothing of models."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF


class _TextMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """A metric of texts, defined here because `evaluate.load` fetches its code from the hub.

    Overrides `_info` and `_compute`, as every metric of evaluate (0.4.6) does.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=datasets.Features({"predictions": text, "references": text}),
        )


class RougeL(_TextMetric):
    """F-measure of the longest common subsequence of words, from 0 to 1, as rouge_score computes it (Lin, 2004).

    Words are runs of the letters a to z and digits, in lower case. Texts in other scripts have none and score 0.
    """

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        from rouge_score.rouge_scorer import RougeScorer  # nltk, which it imports, takes half a second

        scorer = RougeScorer(["rougeL"])
        pairs = zip(references, predictions, strict=True)
        scores = [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference, prediction in pairs]
        return {"rougeL": sum(scores) / len(scores), "documents": scores}


class Bleu(_TextMetric):
    """Agreement in runs of up to four words, from 0 to 100, as sacrebleu computes it (Papineni et al., 2002).

    Of all answers together: a single short answer has no run of four words.
    """

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"bleu": BLEU().corpus_score(predictions, [references]).score}


class ChrF(_TextMetric):
    """Agreement in runs of up to six characters, from 0 to 100, as sacrebleu computes it (Popović, 2015).

    Works in every script.
    """

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        chrf = CHRF()
        pairs = zip(predictions, references, strict=True)
        return {
            "chrf": chrf.corpus_score(predictions, [references]).score,
            "documents": [chrf.sentence_score(prediction, [reference]).score for prediction, reference in pairs],
        }
