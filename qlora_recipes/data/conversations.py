"""From a file to conversations, with the reason of every row that is none. Knows nothing of tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from qlora_recipes.data.columns import ColumnUse, WatchedRow
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError
from qlora_recipes.formatters import (
    FORMATTERS,
    TEXT,
    Formatter,
    Message,
    Reason,
    RowError,
    Tools,
    check_conversation,
    detect,
    preferences,
    split_reasoning,
    strings,
    words_of,
)
from qlora_recipes.formatters.preferences import pair
from qlora_recipes.recipe import DatasetSpec

_OURS = frozenset(FORMATTERS.values())


class Row(NamedTuple):
    """A row on its way from the file to the encoder."""

    place: str
    messages: list[Message]
    tools: Tools | None
    rejected: str | None
    """The other answer of a row of preferences."""
    source: Any
    """The row as it was read."""

    @property
    def characters(self) -> int:
        """How many are encoded, without those of the template."""
        texts = [text for messages, _ in self.conversations for message in messages for text in words_of(message)]
        return sum(map(len, texts)) + sum(map(len, strings(self.tools)))

    @property
    def conversations(self) -> list[tuple[list[Message], Tools | None]]:
        """What is rendered: the conversation, and of a row of preferences the one that ends with the other answer."""
        whole = (self.messages, self.tools)
        if self.rejected is None:
            return [whole]
        return [whole, ([*self.messages[:-1], {**self.messages[-1], "content": self.rejected}], self.tools)]


@dataclass
class Tally:
    """What is counted while the rows of one dataset are read."""

    spec: DatasetSpec
    formatter: Formatter | None
    name: str
    """Stands before the places of its rows, where there are several datasets."""
    of_preferences: bool
    dropped: Counter[str] = field(default_factory=Counter)
    contents: Counter[str] = field(default_factory=Counter)
    figures: list[numpy.ndarray] = field(default_factory=list)
    columns: ColumnUse = field(default_factory=ColumnUse)
    revision: str | None = None


def formatted(tally: Tally, knows_reasoning: bool) -> Iterator[Row | str]:
    """Yield the rows of a dataset as conversations, or the reason why one is none."""
    spec = tally.spec
    rows = read_rows(spec.source, split=spec.split, revision=spec.revision)
    tally.revision = rows.revision
    for place, row in rows:
        if spec.share < 1 and not _is_drawn(place, spec.share):
            continue
        try:
            yield format_row(tally, WatchedRow(row) if isinstance(row, dict) else row, place, knows_reasoning)
        except RowError as error:
            yield error.reason


def format_row(tally: Tally, row: Any, place: str, knows_reasoning: bool) -> Row:
    """Return one row as a conversation; the first valid row decides for its file which formatter fits.

    Raises:
        RowError: when the row cannot be used.
    """
    spec, where = tally.spec, f"{tally.spec.source}, {place}"
    tally.formatter = tally.formatter or (preferences if tally.of_preferences else _detect(row, where))
    messages, tools, rejected = _format(tally.formatter, row, where, pairs=tally.of_preferences)
    if spec.system and messages[0]["role"] not in ("system", "developer", TEXT):
        messages = [{"role": "system", "content": spec.system.strip()}, *messages]
    if knows_reasoning:
        messages = split_reasoning(messages)
    return Row(f"{tally.name}{place}", messages, tools, rejected, row)


def _is_drawn(place: str, share: float) -> bool:
    """Whether a row belongs to a share of its dataset: by a hash of its place, so that every arm draws the same."""
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:8]) < share * 2**64


def _detect(row: Any, where: str) -> Formatter:
    if not isinstance(row, Mapping):
        raise RowError(Reason.NOT_AN_OBJECT, f"{where} is {type(row).__name__}, expected names with values")
    try:
        return detect(row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _format(
    formatter: Formatter, row: Any, place: str, *, pairs: bool
) -> tuple[list[Message], Tools | None, str | None]:
    """Apply a formatter, and name the row in whatever error it raises."""
    name = getattr(formatter, "__name__", "format_row")
    try:
        found: Any = formatter(row)
        if not pairs and formatter in _OURS:  # which have checked what they give
            return (found, None, None) if isinstance(found, list) else (found["messages"], found["tools"], None)
        if not pairs:
            return *check_conversation(found, source=name), None
        if not isinstance(found, Mapping) or not {"messages", "rejected"} <= found.keys():
            raise RowError(Reason.NOT_A_PAIR, f"{name} gave no messages and rejected, expected both")
        answer = {"role": "assistant", "content": found["rejected"]}
        found = pair(found, {**found, "messages": [*found["messages"][:-1], answer]})
        return found["messages"], found.get("tools"), found["rejected"]
    except RowError:
        raise
    except Exception as error:  # a user's formatter can raise anything
        columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(
            f"{place}: {name} failed with {type(error).__name__}: {error}. The row has {columns}. "
            "Fix the formatter, or let it raise RowError(reason, detail) for rows that should be left out"
        ) from error
