"""A NaN or infinite loss or gradient ends the run and shows the rows that it came from; nothing of it is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.errors import DivergenceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A float16 gradient scaler starts at 2**16 and halves at each overflow: that many skipped steps are its normal search.
SCALER_TRIES = 24
_SHOWN, _WIDTH = 8, 300  # rows of a batch, characters of a row


def refuse(
    what: str,
    value: float,
    step: int,
    batches: Sequence[Mapping[str, Any]],
    trained: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
) -> NoReturn:
    """Raise, naming the step and showing the rows of its batches.

    Raises:
        DivergenceError: always.
    """
    rows = [ids for batch in batches for ids in conversations(batch)]
    expected = {tuple(ids) for ids in rows[:_SHOWN]}
    places = {key: row.place for row in trained if (key := tuple(row.encoded.input_ids)) in expected}
    shown = "\n".join(f"  {places.get(tuple(ids), 'a row')}: {_text(ids, tokenizer)}" for ids in rows[:_SHOWN])
    more = f"\n  and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    raise DivergenceError(
        f"the {what} of step {step} is {value}, expected a finite number; nothing of this step is saved, and the "
        "checkpoints before it are kept. Lower --learning_rate, lengthen --warmup_steps, or look at the rows of its "
        f"batch on this process:\n{shown}{more}"
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
