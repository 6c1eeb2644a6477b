"""Packed conversations cannot see each other, whatever the model's attention mask is made of."""

from __future__ import annotations

import math

from qlora_recipes.data.encoding import Encoded
from qlora_recipes.preflight.probes import collate, logits
from qlora_recipes.preflight.verdicts import fail_unless, passed, warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import ReadyRun

_TOKENS = 300  # of each conversation: together more than those that attention tells apart by a mask
_NOISE = 1e-3  # of how far the changed conversation's own logits move; a leak measured 0.1 and more


def packing_leak(run: ReadyRun) -> Check:
    """Change one packed conversation, and watch the logits of the next."""
    if not run.trainer.padding_free:
        return _not_packed(run)
    first, second = (_repeated(run.data.train[i % len(run.data.train)].encoded.input_ids) for i in (0, 1))
    start = len(first)
    changed = [*first[:1], *reversed(first[1:])]  # words in another order: the same length, other keys and values
    plain, moved = (logits(run, collate(run, [_row(part), _row(second)]))[0] for part in (first, changed))
    leak = float((plain[start:] - moved[start:]).abs().max())
    own = float((plain[:start] - moved[:start]).abs().max())
    mended = ", after separate_packed_falcon" if "separate_packed_falcon" in run.repairs else ""
    return fail_unless(
        leak <= _NOISE * own,
        f"{leak:.2g} in the next conversation's logits, {own:.2g} in its own{mended}",
        "The model's mask ignores position_ids: mend it in repairs.py, or set --packing false --padding_free false.",
    )


def _repeated(ids: list[int]) -> list[int]:
    return (ids * math.ceil(_TOKENS / len(ids)))[:_TOKENS]


def _row(ids: list[int]) -> Encoded:
    return Encoded(ids, ids)


def _not_packed(run: ReadyRun) -> Check:
    if not run.trainer.args.packing:
        return passed("not packed; one conversation a row")
    return warn_unless(
        False,
        f"packing_strategy {run.trainer.args.packing_strategy} lays conversations end to end, without a mask between",
        "Set --packing_strategy bfd, which keeps them apart.",
    )
