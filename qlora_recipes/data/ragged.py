"""Lists of numbers of different lengths, one after another in one array. Knows nothing of what they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy
import pyarrow


class Ragged:
    """Lists of numbers as one array of `values` and one of `lengths`."""

    def __init__(self, values: numpy.ndarray, lengths: numpy.ndarray) -> None:
        self.values = values
        self.lengths = lengths

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """Return lists of 32-bit numbers as arrays."""
        lengths = numpy.fromiter(map(len, lists), numpy.int64, len(lists))
        return cls(numpy.fromiter(chain.from_iterable(lists), numpy.int32, lengths.sum()), lengths)

    @classmethod
    def from_arrow(cls, column: pyarrow.ChunkedArray) -> Ragged:
        """Return a column of lists, none of them null, as arrays."""
        lists = column.combine_chunks()
        return cls(lists.flatten().to_numpy(), lists.value_lengths().to_numpy())

    @cached_property
    def ends(self) -> numpy.ndarray:
        """Where each list ends in `values`."""
        return numpy.cumsum(self.lengths)

    @cached_property
    def starts(self) -> numpy.ndarray:
        """Where each list begins in `values`."""
        starts: numpy.ndarray = self.ends - self.lengths
        return starts

    def split(self) -> list[numpy.ndarray]:
        """Return the values of each list."""
        return numpy.split(self.values, self.ends[:-1])

    def sums(self, numbers: numpy.ndarray) -> numpy.ndarray:
        """Return one sum for each list, of numbers or bools in the places of `values`; 0 for an empty one."""
        kind = numpy.uint64 if numbers.dtype == numpy.uint64 else numpy.int64
        before = numpy.concatenate([numpy.zeros(1, kind), numbers.cumsum(dtype=kind)])
        sums: numpy.ndarray = before[self.ends] - before[self.starts]
        return sums

    def where(self, chosen: numpy.ndarray) -> Ragged:
        """Return the lists for which `chosen`, one bool for each, is true."""
        return self if chosen.all() else Ragged(self.values[numpy.repeat(chosen, self.lengths)], self.lengths[chosen])

    def cut(self, longest: int) -> Ragged:
        """Return at most the first `longest` numbers of each list."""
        if self.lengths.max(initial=0) <= longest:
            return self
        return Ragged(self.values[self.places() < longest], numpy.minimum(self.lengths, longest))

    def places(self) -> numpy.ndarray:
        """Return the place of each value in its list, from 0 up."""
        places: numpy.ndarray = numpy.arange(len(self.values)) - numpy.repeat(self.starts, self.lengths)
        return places

    def to_arrow(self) -> pyarrow.ListArray:
        """Return the lists as a column."""
        offsets = numpy.concatenate([numpy.zeros(1, numpy.int32), self.ends.astype(numpy.int32)])
        return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(self.values))
