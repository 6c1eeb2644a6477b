"""What the run folders hold besides the arms' scores: controls, divergence, quantization error.

Reads files; what is missing is left out, and what was measured on other weights is refused.
Knows nothing of statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_recipes.comparison.evaluated import Arms, Results, Run, check_weights, read_results
from qlora_recipes.evaluation.records import (
    Divergence,
    LayerError,
    UnfinishedTaskError,
    read_divergence,
    read_quantization_error,
)

BASE = "base"
"""Folder in a run's evaluation where its base before tuning is scored."""
NOISE = "noise"
"""Name of the comparison of the baseline's second seed with its first."""


@dataclass(frozen=True)
class Controls:
    """What is measured besides the scores of the arms, each where there is any."""

    bases: Mapping[str, Results]
    """Precision to the scores of its base before tuning."""
    cross_base: Mapping[str, Sequence[Results]]
    """Precision to the scores of the baseline's adapters on that precision's base, in the order of the seeds."""
    divergences: Mapping[str, Divergence]
    """Precision, or `noise`, to its distance from the baseline's distributions."""
    quantization_errors: Mapping[str, list[LayerError]]
    """Precision to the error of each of its layers."""


def read_controls(arms: Arms) -> Controls:
    """Return everything that the run folders hold besides the runs' own scores; the baseline is the first arm.

    Raises:
        ComparisonError: when a control was scored with other weights than the runs'.
        RunFolderError: when a file is damaged.
    """
    reference, *more_seeds = next(iter(arms.values())).values()
    first = {name: next(iter(by_seed.values())).folder for name, by_seed in arms.items()}
    others = {name: first[name] for name in list(arms)[1:]}
    pairs = others | ({NOISE: more_seeds[0].folder} if more_seeds else {})
    return Controls(
        bases={name: base for name in arms if (base := _base(name, arms[name]))},
        cross_base={name: results for name in others if (results := _cross_base(name, arms))},
        divergences={name: found for name, run in pairs.items() if (found := read_divergence(reference.folder, run))},
        quantization_errors={name: errors for name, run in first.items() if (errors := read_quantization_error(run))},
    )


def _base(name: str, by_seed: Mapping[int, Run]) -> Results | None:
    """The base has no seed: it is scored once, in the folder of any of its runs."""
    read = (_read(run, BASE, f"{name} base before tuning", None, run.receipt.base.sha256) for run in by_seed.values())
    return next((results for results in read if results), None)


def _cross_base(name: str, arms: Arms) -> list[Results]:
    """All seeds or none: fewer seeds cannot be compared with means of more."""
    baseline, by_seed = next(iter(arms.items()))
    found = []
    for seed, run in by_seed.items():
        adapter, base = run.receipt.adapter.final_sha256, arms[name][seed].receipt.base.sha256
        found.append(_read(run, f"on-{name}", f"{baseline} seed {seed} on {name}", adapter, base))
    scored = [results for results in found if results]
    return scored if len(scored) == len(found) else []


def _read(run: Run, control: str, name: str, adapter: str | None, base: str) -> Results | None:
    """Return a control in the tasks of the run; None where it was not scored in all of them."""
    try:
        results = read_results(run.folder.evaluation / control, list(run.results.tasks), name)
    except UnfinishedTaskError:
        return None
    check_weights(results, adapter, base, "this control again with --overwrite")
    return results
