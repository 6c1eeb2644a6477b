"""What the run folders hold besides the arms' scores: controls, divergence, quantization error.

Reads files; what is missing is left out, and what was measured on other weights is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora_recipes.comparison.evaluated import Results, Run, check_weights, group, read_results
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

    bases: Mapping[str, Results] = field(default_factory=dict)
    """Precision to the scores of its base before tuning."""
    cross_base: Mapping[str, Sequence[Results]] = field(default_factory=dict)
    """Precision to the scores of the baseline's adapters on that precision's base, in the order of the seeds."""
    divergences: Mapping[str, Divergence] = field(default_factory=dict)
    """Precision, or `noise`, to its distance from the baseline's distributions."""
    quantization_errors: Mapping[str, list[LayerError]] = field(default_factory=dict)
    """Precision to the error of each of its layers."""


def read_controls(runs: Sequence[Run], baseline: str) -> Controls:
    """Return everything that the run folders hold besides the runs' own scores.

    Raises:
        ComparisonError: when a control was scored with other weights than the runs'.
        RunFolderError: when a file is damaged.
    """
    arms = group(runs)
    others = [name for name in arms if name != baseline]
    return Controls(
        bases={name: base for name, by_seed in arms.items() if (base := _base(name, by_seed)) is not None},
        cross_base={name: found for name in others if (found := _cross_base(name, arms, baseline))},
        divergences=_divergences(arms, baseline),
        quantization_errors={
            name: errors for name in others if (errors := read_quantization_error(_first(arms[name]).folder))
        },
    )


def _first(by_seed: Mapping[int, Run]) -> Run:
    return next(iter(by_seed.values()))


def _base(name: str, by_seed: Mapping[int, Run]) -> Results | None:
    """The base has no seed: it is scored once, in the folder of any of its runs."""
    for run in by_seed.values():
        found = _read(run, BASE, f"{name} base before tuning", None, run.receipt.base.sha256)
        if found is not None:
            return found
    return None


def _cross_base(name: str, arms: Mapping[str, Mapping[int, Run]], baseline: str) -> list[Results]:
    """All seeds or none: fewer seeds cannot be compared with means of more."""
    found = [
        _read(
            run,
            f"on-{name}",
            f"{baseline} seed {seed} on {name}",
            run.receipt.adapter.final_sha256,
            arms[name][seed].receipt.base.sha256,
        )
        for seed, run in arms[baseline].items()
    ]
    scored = [results for results in found if results is not None]
    return scored if len(scored) == len(found) else []


def _read(run: Run, control: str, name: str, adapter: str | None, base: str) -> Results | None:
    """Return a control in the tasks of the run; None where it was not scored in all of them."""
    try:
        results = read_results(run.folder.evaluation / control, list(run.results.tasks), name)
    except UnfinishedTaskError:
        return None
    check_weights(results, adapter, base, "this control again with --overwrite")
    return results


def _divergences(arms: Mapping[str, Mapping[int, Run]], baseline: str) -> dict[str, Divergence]:
    reference = _first(arms[baseline]).folder
    pairs = {name: _first(by_seed).folder for name, by_seed in arms.items() if name != baseline}
    if len(arms[baseline]) > 1:
        pairs[NOISE] = list(arms[baseline].values())[1].folder
    return {name: found for name, run in pairs.items() if (found := read_divergence(reference, run)) is not None}
