"""From evaluated runs to everything a report says about them. Runs in, one record out; no models, no rendering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qlora_recipes.comparison.arms import overall_score, stored_weights
from qlora_recipes.comparison.claims import paper_claims
from qlora_recipes.comparison.contrasts import Criteria, contrast, criteria_for, mean_scores, overall_difference
from qlora_recipes.comparison.controls import NOISE, Controls
from qlora_recipes.comparison.evaluated import AlignedScores, Arms, Results, Run, align_runs
from qlora_recipes.comparison.findings import Arm, Control, Effect, LossCurve, Report, before_tuning
from qlora_recipes.comparison.paired import Comparison
from qlora_recipes.comparison.sentences import interval, points
from qlora_recipes.comparison.validity import validity
from qlora_recipes.precision import PRECISIONS


def choose_baseline(precisions: Sequence[str]) -> str:
    """Return the precision that the others are compared with: the only 16-bit one of two, the first of more.

    Of two quantized ones, as `compare A B` names them, it is the second.
    """
    if len(precisions) > 2:
        return precisions[0]
    full = [name for name in precisions if not PRECISIONS[name].quantized]
    return full[0] if len(full) == 1 else precisions[-1]


def build_report(
    arms: Arms,
    *,
    margin: float,
    controls: Controls,
    earlier_margins: Sequence[float] = (),
    command: Sequence[str] = (),
) -> Report:
    """Compare every arm with the first one, the baseline; `margin` is in points, `command` is what was called.

    Raises:
        ComparisonError: when the runs cannot be aligned, or have too few scores for a verdict.
    """
    runs = [run for by_seed in arms.values() for run in by_seed.values()]
    first = runs[0].receipt

    def aligned(name: str, results: Sequence[Results]) -> AlignedScores:
        return align_runs(name, results, runs[0].results)

    scores = {name: aligned(name, [run.results for run in by_seed.values()]) for name, by_seed in arms.items()}
    bases = {name: aligned(before_tuning(name), [results]) for name, results in controls.bases.items()}
    cross_base = {
        name: aligned(f"{first.precision} adapter on the {name} base", results)
        for name, results in controls.cross_base.items()
    }
    baseline, *others = scores.values()
    seeds = list(arms[baseline.name])
    criteria = criteria_for(baseline, margin)
    noise = None
    if len(seeds) > 1:  # the baseline's second seed against its first: the difference that no precision makes
        one, two = (AlignedScores(f"{baseline.name} seed {seeds[i]}", [baseline.results[i]]) for i in (0, 1))
        noise = contrast(two, one, seeds[:1], criteria, controls.divergences.get(NOISE))
    errors = controls.quantization_errors
    effects = list(_effects(scores, bases, cross_base, criteria))
    tuning = effects[0].comparison if baseline.name in bases else None
    described = [_arm(list(arms[one.name].values()), one, criteria) for one in scores.values()]
    started = sorted(run.receipt.started for run in runs)
    return Report(
        recipe=first.recipe,
        trained=(started[0], started[-1]),
        command=list(command),
        versions=first.versions,
        demo=first.demo,
        model=first.base.model,
        dtype=first.dtype,
        baseline=baseline.name,
        seeds=seeds,
        margin=margin,
        earlier_margins=list(earlier_margins),
        limit=criteria.limit,
        arms=described,
        contrasts=[
            contrast(one, baseline, seeds, criteria, controls.divergences.get(one.name), errors.get(one.name, ()))
            for one in others
        ],
        noise=noise,
        controls=[
            Control(one.name, mean_scores(one, criteria), overall_score(one, criteria))
            for one in (*bases.values(), *cross_base.values())
        ],
        effects=effects,
        claims=list(paper_claims(described, scores, seeds, criteria, errors)) if len(scores) > 2 else [],
        losses=[_loss_curve(run) for run in runs],
        validity=validity(runs),
        caveats=list(_caveats(list(scores.values()), tuning, criteria, earlier_margins)),
    )


def _arm(runs: Sequence[Run], scores: AlignedScores, criteria: Criteria) -> Arm:
    receipts = [run.receipt for run in runs]
    training = [receipt.training for receipt in receipts]
    return Arm(
        precision=scores.name,
        seeds=[run.seed for run in runs],
        scores=mean_scores(scores, criteria),
        base_bytes=receipts[0].base.bytes,
        peak_bytes=max(receipt.memory.peak_bytes for receipt in receipts),
        adapter_bytes=receipts[0].adapter.bytes,
        tokens_per_second=float(np.mean([part.tokens_per_second for part in training])),
        seconds=float(np.mean([part.seconds for part in training])),
        final_loss=float(np.mean([part.final_loss for part in training])),
        overall=overall_score(scores, criteria),
        weights=stored_weights(receipts[0].base, PRECISIONS[scores.name]),
    )


def _effects(
    arms: Mapping[str, AlignedScores],
    bases: Mapping[str, AlignedScores],
    cross_base: Mapping[str, AlignedScores],
    criteria: Criteria,
) -> Iterator[Effect]:
    """Yield what tuning did to the baseline; then the steps from it to an arm, by what a base does in which stage."""

    def effect(name: str, meaning: str, a: AlignedScores, b: AlignedScores) -> Effect:
        return Effect(name, meaning, overall_difference(a, b, criteria))

    of, baseline = next(iter(arms.items()))
    before = bases.get(of)
    if before:
        first = AlignedScores(of, baseline.results[:1])
        yield effect(f"{of}: tuning", f"{of} after tuning against before, first seed", first, before)
    for name, crossed in cross_base.items():
        if before and name in bases:
            yield effect(f"{name}: before tuning", "the two bases without an adapter", bases[name], before)
        yield effect(f"{name}: inference", f"the {of} adapter, on {name} against on its own base", crossed, baseline)
        meaning = f"the adapter trained on {name} against the {of} one, both on {name}"
        yield effect(f"{name}: training", meaning, arms[name], crossed)


def _caveats(
    arms: Sequence[AlignedScores], tuning: Comparison | None, criteria: Criteria, earlier_margins: Sequence[float]
) -> Iterator[str]:
    """Yield reasons to believe a verdict less than its interval says: the agreement of arms that cannot disagree."""
    if earlier_margins:
        earlier = ", then ".join(f"±{margin:g}" for margin in earlier_margins)
        yield f"The margin was changed after it had been stated: it was {earlier} points before."
    for task in criteria.verdict:
        scores = {float(score) for arm in arms for score in arm.scores(task).flat}
        if len(scores) == 1:
            extreme = "wrong" if scores == {0.0} else "right" if scores == {1.0} else "scored the same"
            yield f"{task} cannot tell the arms apart: every answer of every arm is {extreme}."
    if tuning is not None:
        low, high = tuning.interval_95
        if low <= 0 <= high:
            yield (
                f"Tuning itself made no difference that these tasks can see: {points(tuning.difference)} "
                f"(95 % interval {interval((low, high))}). Adapters that learned nothing agree in any precision."
            )


def _loss_curve(run: Run) -> LossCurve:
    logged = [(step.step, step.loss) for step in run.folder.logged_steps() if step.loss is not None]
    return LossCurve(run.precision, run.seed, [step for step, _ in logged], [loss for _, loss in logged])
