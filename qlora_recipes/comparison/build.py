"""From evaluated runs to everything a report says about them. Runs in, one record out; no models, no rendering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from qlora_recipes.comparison.arms import overall_score, stored_weights
from qlora_recipes.comparison.claims import paper_claims
from qlora_recipes.comparison.contrasts import Criteria, contrast, criteria_for, mean_scores, overall_difference
from qlora_recipes.comparison.controls import NOISE, Controls
from qlora_recipes.comparison.evaluated import AlignedScores, Arms, Results, Run, align_runs
from qlora_recipes.comparison.findings import (
    Arm,
    BitsContrast,
    Contrast,
    Control,
    Effect,
    Fact,
    LossCurve,
    Report,
    before_tuning,
)
from qlora_recipes.comparison.informative import doubts
from qlora_recipes.comparison.preregistration import Preregistration, departures
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
    plan: Preregistration | None = None,
    command: Sequence[str] = (),
) -> Report:
    """Compare every arm with the first one, the baseline; `margin` is in points.

    `plan` is what was fixed beforehand, `command` what was called.

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
    criteria = criteria_for(list(scores.values()), margin)
    effects = list(_effects(scores, bases, cross_base, criteria))
    tuning = effects[0].comparison if baseline.name in bases else None
    if criteria.limit is None:  # a trial is no result, whatever agrees in it
        doubted = doubts(list(scores.values()), tuning, criteria)
        criteria = replace(criteria, doubts=doubted, base_scored=tuning is not None)
    noise = None
    if len(seeds) > 1:  # the baseline's second seed against its first: the difference that no precision makes
        one, two = (AlignedScores(f"{baseline.name} seed {seeds[i]}", [baseline.results[i]]) for i in (0, 1))
        noise = contrast(two, one, seeds[:1], criteria, controls.divergences.get(NOISE))
    errors = controls.quantization_errors
    contrasts = [
        contrast(one, baseline, seeds, criteria, controls.divergences.get(one.name), errors.get(one.name, ()))
        for one in others
    ]
    exploratory = departures(
        plan, recipe=first.recipe, margin=margin, precisions=list(arms), seeds=seeds, tasks=list(runs[0].results.tasks)
    )
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
        exploratory=exploratory,
        limit=criteria.limit,
        arms=described,
        contrasts=contrasts,
        noise=noise,
        controls=[
            Control(one.name, mean_scores(one, criteria), overall_score(one, criteria))
            for one in (*bases.values(), *cross_base.values())
        ],
        effects=effects,
        claims=list(paper_claims(described, scores, seeds, criteria, errors)) if len(scores) > 2 else [],
        losses=[_loss_curve(run) for run in runs],
        validity=[*validity(runs), *([_fixed(plan, exploratory)] if plan else [])],
        caveats=[*_caveats(contrasts, earlier_margins), *_coupled_rows(runs)],
    )


def _fixed(plan: Preregistration, exploratory: Sequence[str]) -> Fact:
    kept = f"margin, tasks, seeds and precisions on {plan.time}, before the first score"
    return Fact("fixed beforehand", "warn" if exploratory else "pass", "; ".join(exploratory) or kept)


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


def _caveats(contrasts: Sequence[Contrast], earlier_margins: Sequence[float]) -> Iterator[str]:
    """Yield reasons to believe a verdict less than its interval says."""
    if earlier_margins:
        earlier = ", then ".join(f"±{margin:g}" for margin in earlier_margins)
        yield f"The margin was changed after it had been stated: it was {earlier} points before."
    for found in contrasts:
        for bits in found.bits:
            yield from _other_way(found, bits)


def _other_way(found: Contrast, bits: BitsContrast) -> Iterator[str]:
    """Say where text is clearly likelier or less likely under an arm whose answers do not change the same way."""
    low, high = bits.comparison.interval_95 if bits.comparison else (0.0, 0.0)
    clear = low > 0 or high < 0
    if clear and found.overall.difference * (bits.a - bits.b) >= 0:  # fewer bits are better, and a higher score
        more = "more" if bits.a > bits.b else "fewer"
        yield (
            f"Bits per byte of {bits.task} point another way than the scores: {found.name} needs "
            f"{abs(bits.a - bits.b):.4f} bits a byte {more} than {found.baseline} (95 % interval "
            f"{interval((low, high), 4)}), and its score differs by {points(found.overall.difference)}. They measure "
            "how likely a text is, not whether an answer is right; the verdict is about answers."
        )


def _coupled_rows(runs: Sequence[Run]) -> Iterator[str]:
    """LLM.int8 multiplies in 16 bits the columns in which any token of a batch has an outlier."""
    coupled = [run for run in runs if run.receipt.base.quantized.outlier_threshold]
    if coupled:
        rows = max(result.batch_size for result in coupled[0].results.tasks.values())
        yield (
            f"In {coupled[0].precision} a document's score depends a little on the others in its batch, through the "
            f"outlier columns of LLM.int8; every arm was scored on the same batches, of up to {rows} rows."
        )


def _loss_curve(run: Run) -> LossCurve:
    logged = [(step.step, step.loss) for step in run.folder.logged_steps() if step.loss is not None]
    return LossCurve(run.precision, run.seed, [step for step, _ in logged], [loss for _, loss in logged])
