"""The claims of the QLoRA paper (arXiv 2305.14314) that a ladder of precisions can look at, beside what it found.

Scores and receipts in, claims out. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from qlora_recipes.comparison.contrasts import Criteria, contrast
from qlora_recipes.comparison.evaluated import AlignedScores
from qlora_recipes.comparison.findings import Arm, Claim
from qlora_recipes.comparison.paired import Comparison
from qlora_recipes.comparison.sentences import interval, points
from qlora_recipes.evaluation.records import LayerError
from qlora_recipes.precision import PRECISIONS

Finding = Literal["found", "not found", "cannot be said here"]


class _OfScores(NamedTuple):
    claim: str
    source: str
    arm: str
    other: str
    """Precision, or `16 bits` for whichever of them is there."""
    expected: Literal["alike", "above", "below"]


_16_BITS = "16 bits"
_OF_SCORES = (
    _OfScores("NF4 with double quantization scores as 16 bits do", "section 4, table 4", "nf4", _16_BITS, "alike"),
    _OfScores("8-bit integers score as 16 bits do", "section 4, table 3", "int8", _16_BITS, "alike"),
    _OfScores("FP4 scores below 16 bits (there by about a point)", "section 4, table 4", "fp4", _16_BITS, "below"),
    _OfScores("NF4 scores above FP4", "section 4, table 4 and figure 3", "nf4", "fp4", "above"),
    _OfScores("Double quantization costs no score", "section 4, figure 3", "nf4", "nf4-single", "alike"),
)
_CONSTANTS, _QUANTIZED_CONSTANTS = 32 / 64, 8 / 64 + 32 / (64 * 256)
"""Bits a weight, by section 3, for blocks of 64 weights and of 256 constants."""
_AS_SAVED = 0.01
"""Bits a weight: a saving this near to the paper's is the paper's; a layer's last block may be a short one."""


def paper_claims(
    arms: Sequence[Arm],
    scores: Mapping[str, AlignedScores],
    seeds: Sequence[int],
    criteria: Criteria,
    errors: Mapping[str, Sequence[LayerError]],
) -> Iterator[Claim]:
    """Yield every claim whose precisions are among the arms; `errors` is by precision."""
    full = next((name for name in scores if not PRECISIONS[name].quantized), "")
    for each in _OF_SCORES:
        other = full if each.other == _16_BITS else each.other
        if each.arm in scores and other in scores:
            found = contrast(scores[each.arm], scores[other], seeds, criteria).overall
            figure = (
                f"{each.arm} against {other}: {points(found.difference)}, 90 % interval {interval(found.interval)}, "
                f"95 % {interval(found.interval_95)}, margin ±{found.margin:g}"
            )
            yield Claim(each.claim, each.source, _judge(found, each.expected), figure)
    if errors.get("nf4") and errors.get("fp4"):
        nf4, fp4 = (sum(layer.relative_error for layer in errors[name]) / len(errors[name]) for name in ("nf4", "fp4"))
        figure = f"mean relative error of the weights {100 * nf4:.2f} % in nf4 and {100 * fp4:.2f} % in fp4"
        yield Claim("NF4 is more precise than FP4", "sections 3 and 4", "found" if nf4 < fp4 else "not found", figure)
    weights = {arm.precision: arm.weights for arm in arms}
    double, single = weights.get("nf4"), weights.get("nf4-single")
    if double and single:
        stored = single.bits - double.bits
        saved = stored - single.table_bits + double.table_bits
        figure = (
            f"{saved:.3f} bits a weight without bitsandbytes' code tables, which have one size for any layer, and "
            f"{stored:.3f} with them, as stored here ({single.bits:.3f} against {double.bits:.3f})"
        )
        verdict: Finding = "found" if abs(saved - (_CONSTANTS - _QUANTIZED_CONSTANTS)) < _AS_SAVED else "not found"
        claim = (
            f"Double quantization takes the constants from {_CONSTANTS:g} to {_QUANTIZED_CONSTANTS:.3f} bits a weight"
        )
        yield Claim(claim, "section 3", verdict, figure)


def _judge(found: Comparison, expected: str) -> Finding:
    """Say whether a difference is the one expected; what is inconclusive, or a trial, says nothing."""
    if found.limited or found.verdict == "inconclusive":
        return "cannot be said here"
    seen = "alike" if found.verdict == "equivalent" else "above" if found.difference > 0 else "below"
    return "found" if seen == expected else "not found"
