"""From evaluated runs to everything a report says of them. Runs in, one record out; no models and no rendering."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qlora_recipes.comparison.caveats import caveats, tuning_effect
from qlora_recipes.comparison.contrasts import Criteria, contrast, criteria, mean_scores, overall_difference
from qlora_recipes.comparison.evaluated import AlignedScores, Results, Run, align_runs, group
from qlora_recipes.comparison.findings import Arm, Contrast, Control, Effect, LossCurve, Report
from qlora_recipes.comparison.validity import validity
from qlora_recipes.errors import ComparisonError
from qlora_recipes.evaluation.kl_files import Divergence, LayerError
from qlora_recipes.precision import PRECISIONS

FEWEST_DOCUMENTS = 20
"""Fewer per task leave an interval of some 20 points at best, which is no ground for any sentence."""
NOISE = "noise"


@dataclass(frozen=True)
class Controls:
    """What is measured beside the scores of the arms, each where there is any."""

    bases: Mapping[str, Results] = field(default_factory=dict)
    """Precision to the scores of its base before tuning."""
    cross_base: Mapping[str, Sequence[Results]] = field(default_factory=dict)
    """Precision to the scores of the baseline's adapters on that precision's base, in the order of the seeds."""
    divergences: Mapping[str, Divergence] = field(default_factory=dict)
    """Precision, or `noise`, to its distance from the baseline's distributions."""
    quantization_errors: Mapping[str, list[LayerError]] = field(default_factory=dict)
    """Precision to the error of each of its layers."""


@dataclass(frozen=True)
class _Aligned:
    """Everything measured, with its documents in one order."""

    arms: Mapping[str, AlignedScores]
    """The baseline first."""
    bases: Mapping[str, AlignedScores]
    cross_base: Mapping[str, AlignedScores]
    seeds: Sequence[int]

    @property
    def baseline(self) -> AlignedScores:
        return next(iter(self.arms.values()))


def choose_baseline(precisions: Sequence[str]) -> str:
    """Return what others are held against: the only 16-bit one of two precisions, the first of more.

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
    extras: Controls | None = None,
    earlier_margins: Sequence[float] = (),
) -> Report:
    """Compare every precision among the runs with the baseline; `margin` is in points.

    Raises:
        ComparisonError: when the runs differ in more than precision and seed, or cannot be lined up.
    """
    arms = group(runs)
    baseline = baseline or choose_baseline(list(arms))
    arms = {name: arms[name] for name in sorted(arms, key=lambda name: name != baseline)}
    extras = extras or Controls()
    lined = _line_up(arms, extras)
    _check_enough(lined.baseline)
    by = criteria(lined.baseline, margin)
    in_order = [run for by_seed in arms.values() for run in by_seed.values()]
    tuning = tuning_effect(lined.baseline, lined.bases.get(baseline), by)
    first = in_order[0].receipt
    return Report(
        recipe=first.recipe,
        demo=first.demo,
        model=first.base.model,
        dtype=first.dtype,
        baseline=baseline,
        seeds=list(lined.seeds),
        margin=margin,
        earlier_margins=list(earlier_margins),
        limit=_limit(lined.baseline),
        arms=[_arm(list(arms[name].values()), one, by) for name, one in lined.arms.items()],
        contrasts=[
            _with_extras(contrast(one, lined.baseline, lined.seeds, by), extras, name)
            for name, one in lined.arms.items()
            if name != baseline
        ],
        noise=_noise(lined, by, extras),
        controls=[
            Control(one.name, mean_scores(one, by)) for one in (*lined.bases.values(), *lined.cross_base.values())
        ],
        effects=[
            *([tuning] if tuning else []),
            *(effect for name in lined.cross_base for effect in _effects(name, lined, by)),
        ],
        losses=[_loss_curve(run) for run in in_order],
        validity=validity(in_order),
        caveats=list(caveats(list(lined.arms.values()), tuning, by, earlier_margins)),
    )


def _line_up(arms: Mapping[str, Mapping[int, Run]], extras: Controls) -> _Aligned:
    (baseline, by_seed), *_ = arms.items()
    reference = next(iter(by_seed.values())).results
    return _Aligned(
        arms={name: align_runs(name, [run.results for run in runs.values()], reference) for name, runs in arms.items()},
        bases={
            name: align_runs(f"{name} base before tuning", [extras.bases[name]], reference)
            for name in arms
            if name in extras.bases
        },
        cross_base={
            name: align_runs(f"{baseline} adapter on the {name} base", extras.cross_base[name], reference)
            for name in arms
            if name in extras.cross_base
        },
        seeds=list(by_seed),
    )


def _limit(measured: AlignedScores) -> int | None:
    limits = [result.limit for result in measured.results[0].tasks.values() if result.limit is not None]
    return min(limits) if limits else None


def _check_enough(measured: AlignedScores) -> None:
    fewest = FEWEST_DOCUMENTS if _limit(measured) is None else 2
    for task, documents in measured.results[0].documents.items():
        if len(documents) < fewest and measured.task(task).kind != "bits_per_byte":
            raise ComparisonError(
                f"{task} has {len(documents)} documents, too few to say anything; expected at least {fewest}. Leave it "
                "out with --tasks, or evaluate more of it"
            )


def _arm(runs: Sequence[Run], measured: AlignedScores, by: Criteria) -> Arm:
    receipts = [run.receipt for run in runs]
    training = [receipt.training for receipt in receipts]
    return Arm(
        precision=measured.name,
        seeds=[run.seed for run in runs],
        scores=mean_scores(measured, by),
        base_bytes=receipts[0].base.bytes,
        peak_bytes=max(receipt.memory.peak_bytes for receipt in receipts),
        adapter_bytes=receipts[0].adapter.bytes,
        tokens_per_second=float(np.mean([part.tokens_per_second for part in training])),
        seconds=float(np.mean([part.seconds for part in training])),
        final_loss=float(np.mean([part.final_loss for part in training])),
    )


def _with_extras(found: Contrast, extras: Controls, name: str) -> Contrast:
    return replace(
        found,
        divergence=extras.divergences.get(name),
        quantization_error=list(extras.quantization_errors.get(name, ())),
    )


def _noise(lined: _Aligned, by: Criteria, extras: Controls) -> Contrast | None:
    """Hold the baseline's second seed against its first: the difference that no precision makes."""
    if len(lined.seeds) < 2:
        return None
    name, results = lined.baseline.name, lined.baseline.results
    first, second = (
        AlignedScores(f"{name} seed {seed}", [one]) for seed, one in zip(lined.seeds[:2], results, strict=False)
    )
    return _with_extras(contrast(second, first, lined.seeds[:1], by), extras, NOISE)


def _effects(name: str, lined: _Aligned, by: Criteria) -> list[Effect]:
    """Split the way from the baseline to an arm into what its base does to answers and what it does to training."""
    baseline, arm, cross_base, bases = lined.baseline, lined.arms[name], lined.cross_base[name], lined.bases
    steps = [
        ("inference", f"the {baseline.name} adapter, on {name} against on its own base", cross_base, baseline),
        ("training", f"the adapter trained on {name} against the {baseline.name} one, both on {name}", arm, cross_base),
    ]
    if name in bases and baseline.name in bases:
        before = ("before tuning", "the two bases without an adapter", bases[name], bases[baseline.name])
        steps.insert(0, before)
    return [Effect(f"{name}: {step}", meaning, overall_difference(a, b, by)) for step, meaning, a, b in steps]


def _loss_curve(run: Run) -> LossCurve:
    lines = run.folder.metrics.read_text(encoding="utf-8").splitlines() if run.folder.metrics.is_file() else []
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    return LossCurve(run.precision, run.seed, [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows])
