"""From evaluated runs to everything a report says about them. Runs in, one record out; no models, no rendering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlora_recipes.comparison.contrasts import Criteria, contrast, criteria_for, mean_scores, overall_difference
from qlora_recipes.comparison.controls import NOISE, Controls
from qlora_recipes.comparison.evaluated import AlignedScores, Run, align_runs, group
from qlora_recipes.comparison.findings import Arm, Contrast, Control, Effect, LossCurve, Report
from qlora_recipes.comparison.sentences import interval, points
from qlora_recipes.comparison.validity import validity
from qlora_recipes.errors import ComparisonError
from qlora_recipes.precision import PRECISIONS

FEWEST_DOCUMENTS = 20
"""Fewer per task leave an interval of some 20 points at best, which supports no verdict."""


@dataclass(frozen=True)
class _Aligned:
    """Everything that was measured, with its documents in one order."""

    arms: Mapping[str, AlignedScores]
    """The baseline first."""
    bases: Mapping[str, AlignedScores]
    cross_base: Mapping[str, AlignedScores]
    seeds: Sequence[int]

    @property
    def baseline(self) -> AlignedScores:
        return next(iter(self.arms.values()))


def choose_baseline(precisions: Sequence[str]) -> str:
    """Return the precision that the others are compared with: the only 16-bit one of two, the first of more.

    Of two quantized ones, as `compare A B` names them, it is the second.
    """
    if len(precisions) > 2:
        return precisions[0]
    full = [name for name in precisions if not PRECISIONS[name].quantized]
    return full[0] if len(full) == 1 else precisions[-1]


def build_report(
    runs: Sequence[Run],
    *,
    margin: float,
    baseline: str | None = None,
    controls: Controls | None = None,
    earlier_margins: Sequence[float] = (),
) -> Report:
    """Compare every precision among the runs with the baseline; `margin` is in points.

    Raises:
        ComparisonError: when the runs differ in more than precision and seed, or cannot be aligned.
    """
    arms = group(runs)
    baseline = baseline or choose_baseline(list(arms))
    arms = {name: arms[name] for name in sorted(arms, key=lambda name: name != baseline)}
    controls = controls or Controls()
    aligned = _align(arms, controls)
    _check_enough(aligned.baseline)
    criteria = criteria_for(aligned.baseline, margin)
    in_order = [run for by_seed in arms.values() for run in by_seed.values()]
    tuning = _tuning_effect(aligned.baseline, aligned.bases.get(baseline), criteria)
    first = in_order[0].receipt
    return Report(
        recipe=first.recipe,
        demo=first.demo,
        model=first.base.model,
        dtype=first.dtype,
        baseline=baseline,
        seeds=list(aligned.seeds),
        margin=margin,
        earlier_margins=list(earlier_margins),
        limit=_limit(aligned.baseline),
        arms=[_arm(list(arms[name].values()), one, criteria) for name, one in aligned.arms.items()],
        contrasts=[
            _with_controls(contrast(one, aligned.baseline, aligned.seeds, criteria), controls, name)
            for name, one in aligned.arms.items()
            if name != baseline
        ],
        noise=_noise(aligned, criteria, controls),
        controls=[
            Control(one.name, mean_scores(one, criteria))
            for one in (*aligned.bases.values(), *aligned.cross_base.values())
        ],
        effects=[
            *([tuning] if tuning else []),
            *(effect for name in aligned.cross_base for effect in _effects(name, aligned, criteria)),
        ],
        losses=[_loss_curve(run) for run in in_order],
        validity=validity(in_order),
        caveats=list(_caveats(list(aligned.arms.values()), tuning, criteria, earlier_margins)),
    )


def _align(arms: Mapping[str, Mapping[int, Run]], controls: Controls) -> _Aligned:
    (baseline, by_seed), *_ = arms.items()
    reference = next(iter(by_seed.values())).results
    return _Aligned(
        arms={name: align_runs(name, [run.results for run in runs.values()], reference) for name, runs in arms.items()},
        bases={
            name: align_runs(f"{name} base before tuning", [controls.bases[name]], reference)
            for name in arms
            if name in controls.bases
        },
        cross_base={
            name: align_runs(f"{baseline} adapter on the {name} base", controls.cross_base[name], reference)
            for name in arms
            if name in controls.cross_base
        },
        seeds=list(by_seed),
    )


def _limit(scores: AlignedScores) -> int | None:
    limits = [result.limit for result in scores.results[0].tasks.values() if result.limit is not None]
    return min(limits) if limits else None


def _check_enough(scores: AlignedScores) -> None:
    fewest = FEWEST_DOCUMENTS if _limit(scores) is None else 2
    for task, documents in scores.results[0].documents.items():
        if len(documents) < fewest and scores.task(task).kind != "bits_per_byte":
            raise ComparisonError(
                f"{task} has {len(documents)} documents, too few to say anything; expected at least {fewest}. Leave it "
                "out with --tasks, or evaluate more of it"
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
    )


def _with_controls(found: Contrast, controls: Controls, name: str) -> Contrast:
    return replace(
        found,
        divergence=controls.divergences.get(name),
        quantization_error=list(controls.quantization_errors.get(name, ())),
    )


def _noise(aligned: _Aligned, criteria: Criteria, controls: Controls) -> Contrast | None:
    """Compare the baseline's second seed with its first: the difference that no precision makes."""
    if len(aligned.seeds) < 2:
        return None
    name, results = aligned.baseline.name, aligned.baseline.results
    first, second = (
        AlignedScores(f"{name} seed {seed}", [one]) for seed, one in zip(aligned.seeds[:2], results, strict=False)
    )
    return _with_controls(contrast(second, first, aligned.seeds[:1], criteria), controls, NOISE)


def _effects(name: str, aligned: _Aligned, criteria: Criteria) -> list[Effect]:
    """Split the way from the baseline to an arm into what its base does to answers and what it does to training."""
    baseline, arm, cross_base, bases = aligned.baseline, aligned.arms[name], aligned.cross_base[name], aligned.bases
    steps = [
        ("inference", f"the {baseline.name} adapter, on {name} against on its own base", cross_base, baseline),
        ("training", f"the adapter trained on {name} against the {baseline.name} one, both on {name}", arm, cross_base),
    ]
    if name in bases and baseline.name in bases:
        before = ("before tuning", "the two bases without an adapter", bases[name], bases[baseline.name])
        steps.insert(0, before)
    return [Effect(f"{name}: {step}", meaning, overall_difference(a, b, criteria)) for step, meaning, a, b in steps]


def _tuning_effect(baseline: AlignedScores, before: AlignedScores | None, criteria: Criteria) -> Effect | None:
    """Return what tuning did to the baseline, by its first seed; None where the base was not scored."""
    if before is None:
        return None
    first = AlignedScores(baseline.name, baseline.results[:1])
    meaning = f"{baseline.name} after tuning against before, first seed"
    return Effect(f"{baseline.name}: tuning", meaning, overall_difference(first, before, criteria))


def _caveats(
    arms: Sequence[AlignedScores], tuning: Effect | None, criteria: Criteria, earlier_margins: Sequence[float]
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
        low, high = tuning.comparison.interval_95
        if low <= 0 <= high:
            yield (
                f"Tuning itself made no difference that these tasks can see: {points(tuning.comparison.difference)} "
                f"(95 % interval {interval((low, high))}). Adapters that learned nothing agree in any precision."
            )


def _loss_curve(run: Run) -> LossCurve:
    logged = [(step.step, step.loss) for step in run.folder.logged_steps() if step.loss is not None]
    return LossCurve(run.precision, run.seed, [step for step, _ in logged], [loss for _, loss in logged])
