"""From a dataset to the token ids that are trained on, with a count of every row dropped and why.

Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from qlora_recipes.data.arrow_rows import Conversation, Rows, write_rows
from qlora_recipes.data.columns import ColumnUse, WatchedRow
from qlora_recipes.data.encoding import ConversationEncoder, Rendered
from qlora_recipes.data.figures import FIGURES, RowMeter
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError
from qlora_recipes.formatters import Formatter, Message, Reason, RowError, check_messages, detect
from qlora_recipes.run.receipt import DataReceipt, TemplateReceipt
from qlora_recipes.settings import Settings

_Row = tuple[str, list[Message], Rendered]  # place, messages and text
_BATCH = 2**18  # characters encoded at once; each of their tokens takes 200 bytes meanwhile
TOO_LONG = "no answer within max_length"
"""Why a row is dropped when truncation leaves nothing in the loss."""


@dataclass(frozen=True)
class PreparedData:
    """The rows of one run, ready for training."""

    train: Sequence[Conversation]
    held_out: Sequence[Conversation]
    figures: numpy.ndarray
    """One record of FIGURES for each training row."""
    held_out_figures: numpy.ndarray
    receipt: DataReceipt
    template: TemplateReceipt


@dataclass
class _Tally:
    """What is counted while rows are read."""

    dropped: Counter[str] = field(default_factory=Counter)
    figures: list[numpy.ndarray] = field(default_factory=lambda: [numpy.empty(0, FIGURES)])
    columns: ColumnUse = field(default_factory=ColumnUse)
    revision: str | None = None


def prepare(
    settings: Settings, encoder: ConversationEncoder, advance: Callable[[int], object] = lambda rows: None
) -> PreparedData:
    """Read, format, encode and split the rows of a run, only a few of which are in memory at a time.

    `advance` is told of every batch how many rows it had.
    The split depends only on the text of the first question: it is the same for every seed, and rows with the same
    first question stay on one side.

    Raises:
        DataError: when the source cannot be read, or no row of it can be used.
        SetupError: when the disk has no room for the encoded rows.
    """
    tally = _Tally()
    rows = write_rows(_encoded(settings, encoder, tally, advance))
    # Workers may fork from here on, without the tokenizers' threads; if this is unset, each prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not rows:
        raise DataError(_nothing_usable(settings, encoder, tally.dropped))
    every = numpy.concatenate(tally.figures)
    tally.figures.clear()  # 63 bytes a row, which are in `every` now
    distinct = numpy.unique(every["question"])
    count = min(math.ceil(settings.data.held_out * len(distinct)), len(distinct) - 1)
    held_out = every["question"] < distinct[count]  # the smallest hashes, whatever the order and the seed
    train, figures = rows.where(~held_out), every[~held_out]
    return PreparedData(
        train=train,
        held_out=rows.where(held_out),
        figures=figures,
        held_out_figures=every[held_out],
        receipt=_data_receipt(settings, train, figures, len(rows), tally),
        template=_template_receipt(encoder, figures),
    )


def _rendered(settings: Settings, encoder: ConversationEncoder, tally: _Tally) -> Iterator[_Row]:
    """Yield the rows that can be used, and count the others."""
    formatter = settings.recipe.formatter()
    rows = read_rows(settings.dataset, split=settings.data.split, revision=settings.data.revision)
    tally.revision = rows.revision
    for place, row in rows:
        where = f"{settings.dataset}, {place}"
        try:
            formatter = formatter or _detect(row, where)  # the first valid row decides for the file
            watched = WatchedRow(row) if isinstance(row, dict) else row
            messages = _format(formatter, watched, where)
            tally.columns.add(watched)
            yield place, messages, encoder.render(messages)
        except RowError as error:
            tally.dropped[error.reason] += 1


def _detect(row: Any, where: str) -> Formatter:
    if not isinstance(row, Mapping):
        raise RowError(Reason.NOT_AN_OBJECT, f"{where} is {type(row).__name__}, expected names with values")
    try:
        return detect(row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _format(formatter: Formatter, row: Any, place: str) -> list[Message]:
    """Apply a formatter, and name the row in whatever error it raises."""
    name = getattr(formatter, "__name__", "format_row")
    try:
        return check_messages(formatter(row), source=name)
    except RowError:
        raise
    except Exception as error:  # a user's formatter can raise anything
        columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(
            f"{place}: {name} failed with {type(error).__name__}: {error}. The row has {columns}. "
            "Fix the formatter, or let it raise RowError(reason, detail) for rows that should be left out"
        ) from error


def _encoded(
    settings: Settings, encoder: ConversationEncoder, tally: _Tally, advance: Callable[[int], object]
) -> Iterator[list[Conversation]]:
    """Yield usable rows in batches, and append the figures of each batch to the tally."""
    meter, max_length = RowMeter(encoder), settings.training["max_length"]
    for batch in _batches(_rendered(settings, encoder, tally)):
        usable = []
        for (place, messages, _), whole in zip(batch, encoder.tokenize([text for *_, text in batch]), strict=True):
            cut = whole.cut(max_length)
            lost, truncated = whole.supervised - cut.supervised, len(whole.input_ids) > max_length
            if cut.supervised:
                usable.append(Conversation(place, messages, cut, lost, truncated))
            else:
                tally.dropped[TOO_LONG] += 1
        tally.figures.append(meter.measure(usable))
        advance(len(batch))
        yield usable


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Yield rows in batches that the tokenizer encodes at once."""
    batch: list[_Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row[2].text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _nothing_usable(settings: Settings, encoder: ConversationEncoder, dropped: Counter[str]) -> str:
    """Say what was expected, and show the first row."""
    place, row = next(read_rows(settings.dataset, split=settings.data.split, revision=settings.data.revision))
    shown = json.dumps(row, ensure_ascii=False, default=str)
    try:
        encoder.render(_format(settings.recipe.formatter() or _detect(row, place), row, place))
        why = "nothing by itself; it is longer than max_length"
    except RowError as error:
        why = str(error)
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    return (
        f"no row of {settings.dataset} can be used ({counts}).\n  the first ({place}): "
        f"{shown[:300]}{'...' if len(shown) > 300 else ''}\n  what is wrong with it: {why}\n"
        "  Give the recipe a formatter that fits these rows (qlora_recipes.formatters), or your own format_row"
    )


def _data_receipt(settings: Settings, train: Rows, figures: numpy.ndarray, usable: int, tally: _Tally) -> DataReceipt:
    digest = hashlib.sha256()
    for messages in train.messages_as_json():
        digest.update(messages.encode())
    return DataReceipt(
        source=settings.dataset_name,
        fingerprint=digest.hexdigest(),
        rows_in=usable + tally.dropped.total(),
        rows_used=len(train),
        rows_held_out=usable - len(train),
        rows_dropped=dict(tally.dropped),
        tokens=int(figures["length"].sum()),
        supervised_tokens=int(figures["supervised"].sum()),
        rows_truncated=int(figures["truncated"].sum()),
        answers_truncated=int((figures["supervised_lost"] > 0).sum()),
        supervised_tokens_lost=int(figures["supervised_lost"].sum()),
        max_length=settings.training["max_length"],
        columns_unread=tally.columns.unread(),
        revision=tally.revision,
    )


def _template_receipt(encoder: ConversationEncoder, figures: numpy.ndarray) -> TemplateReceipt:
    return TemplateReceipt(
        name=encoder.template.name,
        origin=encoder.template.origin,
        sha256=encoder.template.sha256,
        role_markers=encoder.template.role_markers,
        bos_per_row=[int(figures["bos"].min()), int(figures["bos"].max())],
        end_token=encoder.end_token,
        end_token_trained=bool((figures["truncated"] | figures["last_is_end"]).all()),
    )
