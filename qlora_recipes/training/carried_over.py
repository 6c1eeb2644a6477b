"""What a checkpoint of ours holds beside upstream's: counts and sums that go on in the next session, of any processes.

Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from qlora_recipes.training.token_count import TokenCount


@dataclass
class CarriedOver:
    """What upstream does not carry over from one session to the next."""

    count: TokenCount
    seconds: float
    """Spent on the steps so far."""
    loss_since_log: float
    """Sum over the steps since the last logged one."""
    loss_logged: float
    """Sum over the steps up to that one."""
    last_logged_step: int
    metrics_since_log: dict[str, list[float]]
    tokens: int
    skipped_steps: int = 0


def of_other_processes(saved: Sequence[CarriedOver], rank: int) -> CarriedOver:
    """Return what a rank goes on with when another number of processes saved this: the first one has all counts.

    The loss of a step is the mean over its processes, and what is logged of it is gathered already.
    """
    counts = TokenCount(*map(sum, zip(*(astuple(each.count) for each in saved), strict=True)))
    loss = sum(each.loss_since_log for each in saved) / len(saved)
    return replace(saved[0], count=counts if rank == 0 else TokenCount(), loss_since_log=loss)
