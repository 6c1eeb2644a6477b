"""Token ids and labels, of one conversation in lists and of many in arrays. Knows nothing of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy

from qlora_recipes.data.ragged import Ragged

IGNORED = -100  # the label that PyTorch's cross-entropy ignores


@dataclass(frozen=True)
class Encoded:
    """One conversation as the model sees it."""

    input_ids: list[int]
    labels: list[int]
    """The id where the token is in the loss, -100 elsewhere; as long as `input_ids`."""

    @property
    def supervised(self) -> int:
        """Number of tokens in the loss."""
        return len(self.labels) - self.labels.count(IGNORED)

    def cut(self, max_length: int) -> Encoded:
        """Return the first `max_length` tokens."""
        return Encoded(self.input_ids[:max_length], self.labels[:max_length])


@dataclass(frozen=True, eq=False)
class EncodedBatch(Sequence[Encoded]):
    """Many conversations as the model sees them."""

    ids: Ragged
    labels: Ragged
    """As long as `ids`."""

    def __len__(self) -> int:
        return len(self.ids.lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedBatch: ...
    def __getitem__(self, index: int | slice) -> Encoded | EncodedBatch:
        if isinstance(index, slice):
            chosen = numpy.zeros(len(self), dtype=bool)
            chosen[index] = True
            return self.where(chosen)
        own = slice(self.ids.starts[index], self.ids.ends[index])
        return Encoded(self.ids.values[own].tolist(), self.labels.values[own].tolist())

    @property
    def supervised(self) -> numpy.ndarray:
        """Number of tokens of each in the loss."""
        return self.labels.sums(self.labels.values != IGNORED)

    def where(self, chosen: numpy.ndarray) -> EncodedBatch:
        """Return the conversations for which `chosen`, one bool for each, is true."""
        return EncodedBatch(self.ids.where(chosen), self.labels.where(chosen))

    def cut(self, max_length: int) -> EncodedBatch:
        """Return the first `max_length` tokens of each."""
        return EncodedBatch(self.ids.cut(max_length), self.labels.cut(max_length))
