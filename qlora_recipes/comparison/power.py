"""What a comparison can find with its documents and seeds, said before anything is measured.

Numbers in, numbers and a sentence out; knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from statsmodels.stats.power import TTestPower

from qlora_recipes.errors import ComparisonError

CHANGED = 0.12
"""Assumed share of documents that one arm gets right and the other wrong."""
SEED_SPREAD = 0.5
"""Assumed standard deviation, in points, of the difference that training noise makes between seeds."""
POWER = 0.8


def detectable_difference(
    documents: Sequence[int], seeds: int, *, changed: float = CHANGED, seed_spread: float = SEED_SPREAD
) -> float:
    """Return the true difference, in points, that is called *different* with 80 % power.

    `documents` holds the number of documents of each task; tasks that ask the same documents count as one. A
    difference must show over documents and, with two seeds or more, over seeds as well, as in `paired.overall`; one
    seed knows nothing of `seed_spread`. Documents are taken as independent: where those of a subject go together it
    takes a larger difference.

    Raises:
        ComparisonError: for numbers that cannot be.
    """
    if not (documents and min(documents) > 1 and seeds > 0 and 0 < changed <= 1 and seed_spread >= 0):
        raise ComparisonError(
            f"got {list(documents)} documents, {seeds} seeds, a changed share of {changed} and a spread of "
            f"{seed_spread}; expected at least 2 documents a task, 1 seed, a share above 0 and a spread from 0 up"
        )
    # A document's difference is -100, 0 or 100 points, so its variance is the share that changes, if few do.
    error = 100 * math.sqrt(changed * sum(1 / number for number in documents)) / len(documents)
    over_documents = _effect(sum(documents)) * math.sqrt(sum(documents)) * error / math.sqrt(seeds)
    if seeds == 1:
        return over_documents
    return max(over_documents, _effect(seeds) * math.hypot(seed_spread, error))


def _effect(number: int) -> float:
    """Return the difference, in standard deviations, that a two-sided paired t test at 5 % finds with that power."""
    return float(TTestPower().solve_power(nobs=number, alpha=0.05, power=POWER))


def plan_sentence(documents: Sequence[int], seeds: int) -> str:
    """Say what a benchmark of these documents, one number a task, and seeds can find."""
    found = detectable_difference(documents, seeds)
    of = f"{sum(documents):,} different documents and {seeds} seed{'s' if seeds > 1 else ''}"
    said = f"with {of} a true difference of {found:.1f} points is found"
    assumed = f"80 % power for independent documents, if {100 * CHANGED:.0f} % of the answers change"
    if seeds == 1:
        return f"{said} ({assumed}); with one seed it is one between two runs, which training noise alone can make"
    return f"{said} ({assumed} and seeds spread by {SEED_SPREAD:g} points)"
