"""What one arm scores by itself, and in how many bits it stores a weight. Knows nothing of other arms."""

from __future__ import annotations

import numpy as np

from qlora_recipes.comparison.contrasts import POINTS, Criteria
from qlora_recipes.comparison.evaluated import AlignedScores
from qlora_recipes.comparison.findings import OverallScore, StoredWeights
from qlora_recipes.comparison.paired import TaskScores, overall
from qlora_recipes.precision import Precision
from qlora_recipes.run.receipt import BaseReceipt

# The code tables of one of bitsandbytes' 4-bit layers, in float32: 16 values of a weight; and where the constants are
# quantized in turn, 256 values of a constant and their mean.
TABLE_BITS = {False: 32 * 16, True: 32 * (16 + 256 + 1)}


def overall_score(scores: AlignedScores, criteria: Criteria) -> OverallScore:
    """Return the mean over the tasks of the verdict with its interval, clustered as differences are.

    Where a t interval leaves the scale, it ends where the scale does.
    """
    tasks = {}
    for task in criteria.verdict:
        documents, points = scores.documents(task)[0], POINTS * scores.scores(task)
        subjects = [document.subject for document in documents]
        clusters = subjects if len(set(subjects)) > 1 else None
        texts = [document.doc_hash for document in documents]
        tasks[task] = TaskScores(points, np.zeros_like(points), clusters, texts)
    found = overall(tasks, margin=criteria.margin)
    low, high = found.interval_95
    return OverallScore(found.difference, (max(low, 0.0), min(high, float(POINTS))))


def stored_weights(base: BaseReceipt, precision: Precision) -> StoredWeights | None:
    """Return the bits a weight takes, from what the receipt counted; None where it cannot be told.

    Whatever is not in the 16-bit dtype belongs to quantized weights, but for a few hundred bytes of rotary embedding.
    """
    bits = {dtype: 8 * size for dtype, size in base.bytes_by_storage.items()}
    full = bits.pop(base.dtype, 0)
    quantized = base.parameters - full // 16
    if not precision.quantized:
        return StoredWeights(0, full / base.parameters, 0.0) if full and base.parameters else None
    if quantized <= 0:
        return None
    tables = base.quantized.found * TABLE_BITS[precision.double_quant] if precision.quant_type else 0
    return StoredWeights(quantized, sum(bits.values()) / quantized, tables / quantized)
