"""Reasons to believe a verdict less than its interval says. An agreement of arms that cannot disagree is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_recipes.comparison.contrasts import Criteria, overall_difference
from qlora_recipes.comparison.evaluated import AlignedScores
from qlora_recipes.comparison.findings import Effect
from qlora_recipes.comparison.sentences import interval, points


def tuning_effect(baseline: AlignedScores, before: AlignedScores | None, by: Criteria) -> Effect | None:
    """Return what tuning did to the baseline, by its first seed; None where the base was not scored."""
    if before is None:
        return None
    first = AlignedScores(baseline.name, baseline.results[:1])
    meaning = f"{baseline.name} after tuning against before, first seed"
    return Effect(f"{baseline.name}: tuning", meaning, overall_difference(first, before, by))


def caveats(
    arms: Sequence[AlignedScores], tuning: Effect | None, by: Criteria, earlier_margins: Sequence[float]
) -> Iterator[str]:
    """Yield one sentence for each."""
    if earlier_margins:
        stated = ", then ".join(f"±{margin:g}" for margin in earlier_margins)
        yield f"The margin was changed after it had been stated: it was {stated} points before."
    for task in by.verdict:
        scores = {float(score) for arm in arms for score in arm.scores(task).flat}
        if len(scores) == 1:
            extreme = "wrong" if scores == {0.0} else "right" if scores == {1.0} else "scored the same"
            yield f"{task} cannot tell the arms apart: every answer of every arm is {extreme}."
    if tuning is not None:
        low, high = tuning.comparison.interval_95
        if low <= 0 <= high:
            yield (
                f"Tuning itself made no difference that these tasks can see: {points(tuning.comparison.difference)} "
                f"(95 % interval {interval((low, high))}). Adapters that learned nothing agree in any precision."
            )
