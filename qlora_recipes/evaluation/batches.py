"""How many rows a model scores or answers at a time: as many as the memory plan has positions for. Knows no task."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, starmap
from typing import TypeVar

from qlora_recipes.base.device import first_line, is_out_of_memory, release_memory
from qlora_recipes.errors import SetupError
from qlora_recipes.evaluation.ranks import over_ranks
from qlora_recipes.memory.estimate import EVALUATED_POSITIONS

_Found = TypeVar("_Found")


@dataclass
class Room:
    """How many positions fit into memory at a time, as far as is known."""

    positions: int = EVALUATED_POSITIONS


def in_order(
    lengths: Sequence[int], most: int, compute: Callable[[int, list[int]], Sequence[_Found]], *, shared: bool = True
) -> list[_Found]:
    """Return the result of every row; each batch is computed by one of the processes (or here), given its place.

    The batches follow from the lengths alone, and so are those of every arm and of any number of processes.
    """
    batches, room = [batch for batch, _ in in_batches(lengths, most, len)], Room()

    def in_one_process(place: int, batch: list[int]) -> list[_Found]:
        found: dict[int, _Found] = {}
        own = [lengths[i] for i in batch]
        for rows, results in in_batches(own, most, lambda rows: compute(place, [batch[i] for i in rows]), room):
            found |= zip(rows, results, strict=True)
        return [found[i] for i in range(len(batch))]

    here = starmap(in_one_process, enumerate(batches))
    found = over_ranks(batches, in_one_process) if shared else list(here)
    results = dict(zip(chain(*batches), chain(*found), strict=True))
    return [results[i] for i in range(len(lengths))]


def in_batches(
    lengths: Sequence[int], most: int, compute: Callable[[list[int]], _Found], room: Room | None = None
) -> Iterator[tuple[list[int], _Found]]:
    """Yield batches of rows, longest first, each with what `compute` makes of it; a row is its index in `lengths`.

    A batch has no more than `most` rows, and than there is room for, or a single row. Where memory runs out, half of
    the rows go on, and `room` shrinks.

    Raises:
        SetupError: when memory runs out with a single row.
    """
    left, room = sorted(range(len(lengths)), key=lambda i: -lengths[i]), room or Room()
    while left:
        longest = lengths[left[0]]
        batch = left[: max(1, min(most, room.positions // longest))]
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
            room.positions = len(batch) * longest // 2
        else:
            yield batch, found
            left = left[len(batch) :]
            continue
        release_memory()  # here, where the error no longer holds what it was raised among
        now = room.positions // longest
        print(f"out of memory with {len(batch)} rows of up to {longest:,} tokens; now {now} at a time", file=sys.stderr)
