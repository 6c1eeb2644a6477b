"""Which rows a check looks at where all would take too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy

Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` items at even distances, the first and the last among them; no random number is drawn."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def spread_where(items: Sequence[Item], holds: Callable[[Item], bool], count: int) -> list[Item]:
    """Return at most `count` of the items for which `holds` is true, at even distances; only these are held."""
    chosen = numpy.flatnonzero(numpy.fromiter(map(holds, items), bool, len(items)))
    return [items[int(i)] for i in spread(chosen, count)]


def count_and_first(names: Iterable[str]) -> tuple[int, str]:
    """Return how many names there are, and the first of them, holding no other."""
    names = iter(names)
    first = next(names, None)
    return (0, "") if first is None else (1 + sum(1 for _ in names), first)
