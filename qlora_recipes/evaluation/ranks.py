"""Shares batches out among the processes of a launcher, so that together they score what one would, to the bit.

Every process makes the same batches, computes every n-th of them, and has the results of all. lm-eval's own way deals
out documents instead: other rows then share a batch, which are padded to other lengths and round differently.
Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def over_ranks(batches: Sequence[Batch], compute: Callable[[int, Batch], Result]) -> list[Result]:
    """Return what `compute` makes of each batch and its place; with several processes, each computes its share.

    All processes must call this with the same batches; results are pickled.
    """
    own = {i: compute(i, batches[i]) for i in range(_state().process_index, len(batches), processes())}
    if processes() > 1:
        import torch.distributed

        parts: list[dict[int, Result]] = [{}] * processes()
        torch.distributed.all_gather_object(parts, own)
        own = {i: result for part in parts for i, result in part.items()}
    return [own[i] for i in range(len(batches))]


def from_first_rank(value: Result) -> Result:
    """Return the first process's value in all of them."""
    values = [value]
    if processes() > 1:
        import torch.distributed

        torch.distributed.broadcast_object_list(values)
    return values[0]


def writes() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return bool(_state().is_main_process)


def processes() -> int:
    """Return how many processes score together."""
    return int(_state().num_processes)


def _state() -> Any:
    from accelerate import PartialState  # torch, which whoever only prints can do without

    return PartialState()
