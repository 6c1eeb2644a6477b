"""The history of a chat, cut by whole turns where it outgrows the model's context. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_recipes.errors import DataError
from qlora_recipes.formatters import Message


def fit_history(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], room: int | None
) -> tuple[list[Message], int]:
    """Return the messages whose prompt has at most `room` tokens, and how many of the oldest questions were left out.

    A question goes together with its answer; a system message stays.

    Raises:
        DataError: when the last question alone does not fit.
    """
    kept = list(messages)
    first = int(kept[0]["role"] == "system")
    left_out = 0
    while room is not None and (length := len(encode(kept))) > room:
        questions = [i for i, message in enumerate(kept) if message["role"] == "user"]
        if len(questions) < 2:
            raise DataError(f"got a question of {length} tokens, expected at most {room}, which leave room to answer")
        del kept[first : questions[1]]
        left_out += 1
    return kept, left_out
