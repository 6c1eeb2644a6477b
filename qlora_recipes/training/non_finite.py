"""A NaN or infinite loss or gradient ends the run and shows the rows that it came from; nothing of it is saved.

In float16 an overflow is part of the loss scaler's search: it skips the step, and only too many of them end the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.errors import DivergenceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SKIPPED = 24
"""Steps that float16's loss scaler may skip: it starts at 2**16 and halves at each overflow, which is its search."""
SKIPPED_SHARE = 0.05
"""And besides, as a share of all steps; it doubles every 2,000 steps, and then skips one or two."""
_SHOWN, _WIDTH = 8, 300  # rows of a batch, characters of a row


def too_many_skipped(in_a_row: int, skipped: int, steps: int) -> str:
    """Return what is wrong with the number of steps that float16's loss scaler skipped; empty where nothing is."""
    if in_a_row <= SKIPPED and skipped <= SKIPPED + SKIPPED_SHARE * steps:
        return ""
    return (
        f"float16's loss scaler skipped {skipped} of {steps} steps, the last {in_a_row} in a row, because their "
        f"gradients overflowed; expected at most {SKIPPED} in a row, and {SKIPPED} and {SKIPPED_SHARE:.0%} in all"
    )


def refuse(
    fault: str,
    batches: Sequence[Mapping[str, Any]],
    trained: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    float16: bool = False,
) -> NoReturn:
    """Raise, showing the rows of a step's batches.

    Raises:
        DivergenceError: always.
    """
    rows = [ids for batch in batches for ids in conversations(batch)]
    expected = {tuple(ids) for ids in rows[:_SHOWN]}
    places = {key: row.place for row in trained if (key := tuple(row.encoded.input_ids)) in expected}
    shown = "\n".join(f"  {places.get(tuple(ids), 'a row')}: {_text(ids, tokenizer)}" for ids in rows[:_SHOWN])
    more = f"\n  and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    dtype = "Use --dtype bfloat16 where the GPU has it, lower" if float16 else "Lower"
    raise DivergenceError(
        f"{fault}; nothing of this step is saved, and the checkpoints before it are kept. {dtype} --learning_rate, "
        f"lengthen --warmup_steps, or look at the rows of its batch on this process:\n{shown}{more}"
    )


def conversations(batch: Mapping[str, Any]) -> Iterator[list[int]]:
    """Yield the ids of each conversation in a batch, padding cut off and packed ones taken apart."""
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    for i, row in enumerate(ids):
        if mask is not None:
            yield row[mask[i].bool()].tolist()
        elif positions is not None:
            starts = torch.nonzero(positions[i] == 0).flatten().tolist()
            yield from (row[a:b].tolist() for a, b in zip(starts, [*starts[1:], len(row)], strict=True))
        else:
            yield row.tolist()


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = repr(tokenizer.decode(list(ids[:_WIDTH])))
    return text if len(text) <= _WIDTH else text[:_WIDTH] + "..."
