"""What the receipts of two runs must share so that a difference in score is one of precision.

Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from qlora_recipes.run.differences import MISSING, differences
from qlora_recipes.run.receipt import Receipt

# Sections and keys that every arm shares. Left out on purpose: timings, paths, the command, git, how the base is
# stored and which repairs it needed, checks, and the adapter after training.
SHARED = (
    "recipe demo dtype settings data template versions base.model base.revision base.parameters adapter.targets "
    "adapter.modules adapter.parameters adapter.dtype training.steps training.micro_batches training.tokens "
    "training.supervised_tokens training.packed training.processes training.device training.attention "
    "spread.nodes spread.wrapper spread.sharding spread.dtypes"
).split()
# Those of them that may differ where runs are compared that were spread otherwise.
SPREAD = "training.processes spread.nodes spread.wrapper spread.sharding spread.dtypes".split()
# How the rows of a step are divided, which may differ then if they are as many.
_DIVIDED = (
    "settings.training.per_device_train_batch_size settings.training.gradient_accumulation_steps training.micro_batches"
).split()
# Those of them, and others, that follow from the seed.
INITIAL = "adapter.initial_sha256"
SEEDED = ["seed", INITIAL]
_OF_SEED = {"settings.training.seed", "training.tokens", "training.supervised_tokens", "training.micro_batches"}


def receipt_differences(
    a: Receipt, b: Receipt, *, same_seed: bool = True, other_spread: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yield every dotted key in which two receipts differ and should not, with both values.

    With `other_spread` how they were spread over processes may differ, but not the rows of a step.
    """
    found = list(_start_differences(a, b, same_seed=same_seed, other_spread=other_spread))
    yield from found
    divided = a.training.processes != b.training.processes and _rows_a_step(a) == _rows_a_step(b)
    free = (*SPREAD, *(_DIVIDED if divided else ())) if other_spread else ()
    own = not found and same_seed and own_starts(a, b)
    for name in SHARED + (SEEDED if same_seed else []):
        if own and name == INITIAL:
            continue
        section = attrgetter(name)
        for key, left, right in differences(section(a), section(b), name):
            if (same_seed or key not in _OF_SEED) and not key.startswith(free):
                yield key, left, right


def _rows_a_step(run: Receipt) -> int:
    """Return the global batch: TRL's defaults are 8 rows and no accumulation."""
    asked = run.settings.training
    rows = asked.get("per_device_train_batch_size", 8) * asked.get("gradient_accumulation_steps", 1)
    return int(rows * run.training.processes)


def own_starts(a: Receipt, b: Receipt) -> bool:
    """Whether two runs began with the adapters of two other runs."""
    return bool(a.start and b.start) and a.adapter.initial_sha256 != b.adapter.initial_sha256


def _start_differences(
    a: Receipt, b: Receipt, *, same_seed: bool, other_spread: bool
) -> Iterator[tuple[str, Any, Any]]:
    """Yield why what two runs began with makes another difference than precision.

    Runs that began with one adapter have that in common, as new adapters of one seed are. Those that began with two are
    arms as a whole, where the earlier runs could be compared themselves: each of the precision of the run that goes on.
    """
    if not (a.start and b.start):
        if a.start or b.start:
            yield "start", a.start.run if a.start else MISSING, b.start.run if b.start else MISSING
    elif own_starts(a, b):
        one, other = a.start, b.start
        if same_seed and (one.receipt.precision, other.receipt.precision) != (a.precision, b.precision):
            yield "start.run", one.run, other.run
        else:
            told = {"same_seed": same_seed, "other_spread": other_spread}
            earlier = receipt_differences(one.receipt, other.receipt, **told)
            yield from ((f"start.receipt.{key}", left, right) for key, left, right in earlier)
