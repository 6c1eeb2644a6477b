"""How many rows a model scores or answers at a time: as many as the memory plan has positions for. Knows no task."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from qlora_recipes.base.device import first_line, is_out_of_memory, release_memory
from qlora_recipes.errors import SetupError
from qlora_recipes.memory.estimate import EVALUATED_POSITIONS

_Found = TypeVar("_Found")


def in_batches(
    lengths: Sequence[int], most: int, compute: Callable[[list[int]], _Found]
) -> Iterator[tuple[list[int], _Found]]:
    """Yield batches of rows, longest first, each with what `compute` makes of it; a row is its index in `lengths`.

    A batch has no more than `most` rows, and than EVALUATED_POSITIONS positions or a single row. The batches follow
    from the lengths alone, and so are those of every arm, until memory runs out: then half of the rows go on.

    Raises:
        SetupError: when memory runs out with a single row.
    """
    left, positions = sorted(range(len(lengths)), key=lambda i: -lengths[i]), EVALUATED_POSITIONS
    while left:
        longest = lengths[left[0]]
        batch = left[: max(1, min(most, positions // longest))]
        try:
            found = compute(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise SetupError(
                    f"out of memory with one row of {longest:,} tokens ({first_line(error)}). What is "
                    "finished is kept. Use a GPU with more memory, or evaluate a run of fewer bits"
                ) from error
            positions = len(batch) * longest // 2
        else:
            yield batch, found
            left = left[len(batch) :]
            continue
        release_memory()  # here, where the error no longer holds what it was raised among
        now = positions // longest
        print(f"out of memory with {len(batch)} rows of up to {longest:,} tokens; now {now} at a time", file=sys.stderr)
