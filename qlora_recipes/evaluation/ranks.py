"""Shares batches out among the processes of a launcher, so that together they score what one would, to the bit.

Every process makes the same batches, computes every n-th of them, and has the results of all. lm-eval's own way deals
out documents instead: other rows then share a batch, which are padded to other lengths and round differently.
Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed
from accelerate import PartialState

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def over_ranks(batches: Sequence[Batch], compute: Callable[[int, Batch], Result]) -> list[Result]:
    """Return what `compute` makes of each batch and its place; with several processes, each computes its share.

    All processes must call this with the same batches; results are pickled.
    """
    own = {i: compute(i, batches[i]) for i in range(PartialState().process_index, len(batches), processes())}
    if processes() > 1:
        parts: list[dict[int, Result]] = [{}] * processes()
        torch.distributed.all_gather_object(parts, own)
        own = {i: result for part in parts for i, result in part.items()}
    return [own[i] for i in range(len(batches))]


def from_first_rank(value: Result) -> Result:
    """Return the first process's value in all of them."""
    values = [value]
    if processes() > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def writes() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return bool(PartialState().is_main_process)


def processes() -> int:
    """Return how many processes score together."""
    return int(PartialState().num_processes)
