"""What the receipts of two runs must share so that a difference in score is one of precision.

Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from qlora_recipes.run.differences import differences
from qlora_recipes.run.receipt import Receipt

# Sections and keys that every arm shares. Left out on purpose: timings, paths, the command, git, how the base is
# stored and which repairs it needed, checks, and the adapter after training.
SHARED = (
    "recipe demo dtype settings data template versions base.model base.revision base.parameters adapter.targets "
    "adapter.modules adapter.parameters adapter.dtype training.steps training.micro_batches training.tokens "
    "training.supervised_tokens training.packed training.processes training.device training.attention"
).split()
# Those of them, and others, that follow from the seed.
SEEDED = ["seed", "adapter.initial_sha256"]
_OF_SEED = {"settings.training.seed", "training.tokens", "training.supervised_tokens", "training.micro_batches"}


def receipt_differences(a: Receipt, b: Receipt, *, same_seed: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yield every dotted key in which two receipts differ and should not, with both values."""
    for name in SHARED + (SEEDED if same_seed else []):
        section = attrgetter(name)
        for key, left, right in differences(section(a), section(b), name):
            if same_seed or key not in _OF_SEED:
                yield key, left, right
