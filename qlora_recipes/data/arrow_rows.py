"""Usable rows in an Arrow file on disk, read back a few at a time, so that memory does not grow with their number.

The file is in a folder of its own among the temporary files; set `TMPDIR` to put it elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy
import pyarrow
from datasets import Dataset

from qlora_recipes.data.conversations import Row
from qlora_recipes.data.encoded import IGNORED, Encoded, EncodedBatch
from qlora_recipes.data.ragged import Ragged
from qlora_recipes.data.words import WordHashes, hash_words
from qlora_recipes.errors import RecipesError, SetupError
from qlora_recipes.formatters import Message, Tools, words_of

_PREFIX = "qlora-recipes-rows-"
_READ = 500  # rows decoded at once
_UNLOCKED_SECONDS = 60  # after it is made, a folder may not be locked yet
_SCHEMA = pyarrow.schema(
    {
        "place": pyarrow.string(),
        "messages": pyarrow.large_string(),  # as JSON; the offsets of `string` end at 2 GiB a batch
        "tools": pyarrow.large_string(),  # as JSON; null where a row has none
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
        "rejected": pyarrow.large_string(),  # null where a row has one answer
        "rejected_ids": pyarrow.list_(pyarrow.int32()),
        "supervised_lost": pyarrow.int32(),
        "truncated": pyarrow.bool_(),
        "passages": pyarrow.list_(pyarrow.int64()),  # see words.py
    }
)
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_ROW = [name for name in _SCHEMA.names if name != "passages"]


@dataclass(frozen=True)
class Conversation:
    """One usable row."""

    place: str
    """Where it is in its file, such as `line 3`."""
    messages: list[Message]
    encoded: Encoded
    """Truncated to max_length."""
    supervised_lost: int
    """Tokens of the answers that truncation removed."""
    truncated: bool
    tools: Tools | None = None
    """Schemas of the tools that the row offers."""
    rejected: str | None = None
    """The answer that is worse than the last one of the messages, in a row of preferences."""
    rejected_ids: list[int] | None = None
    """Its tokens, which follow the same prompt; truncated to max_length with it."""

    @property
    def pair(self) -> dict[str, list[int]]:
        """The prompt's tokens and those of both answers, as DPOTrainer's collator takes them."""
        return _pair({**vars(self.encoded), "rejected_ids": self.rejected_ids})


def answer_span(labels: Sequence[int]) -> tuple[int, int]:
    """Return where the answer begins and ends, in a row whose loss is one answer."""
    supervised = [i for i, label in enumerate(labels) if label != IGNORED]
    return supervised[0], supervised[-1] + 1


def answer_ids(row: Encoded) -> list[int]:
    """Return the tokens of the answer, in a row whose loss is one answer."""
    return row.input_ids[slice(*answer_span(row.labels))]


def _pair(row: Mapping[str, Any]) -> dict[str, list[int]]:
    ids, (start, end) = row["input_ids"], answer_span(row["labels"])
    return {"prompt_ids": ids[:start], "chosen_ids": ids[start:end], "rejected_ids": row["rejected_ids"]}


@dataclass(frozen=True)
class Batch:
    """Rows that are measured and written together."""

    rows: Sequence[Row | Conversation]
    encoded: EncodedBatch
    """Truncated to max_length."""
    supervised_lost: numpy.ndarray
    truncated: numpy.ndarray
    rejected_ids: Sequence[list[int] | None]

    @classmethod
    def of(cls, rows: Sequence[Conversation]) -> Batch:
        """Return conversations as a batch."""
        ids, labels = (Ragged.of([getattr(row.encoded, name) for row in rows]) for name in ("input_ids", "labels"))
        lost, truncated = ([getattr(row, name) for row in rows] for name in ("supervised_lost", "truncated"))
        rejected = [row.rejected_ids for row in rows]
        return cls(rows, EncodedBatch(ids, labels), numpy.array(lost), numpy.array(truncated), rejected)

    @cached_property
    def hashes(self) -> WordHashes:
        """What their words are."""
        return hash_words([[" ".join(words_of(message)) for message in row.messages] for row in self.rows])


class Rows(Sequence[Conversation]):
    """Conversations on disk; each is read again whenever it is asked for."""

    def __init__(self, file: _RowFile | None, table: Dataset) -> None:
        self._file = file  # held, since it removes the file when it goes
        self._table = table
        self._conversations = table.select_columns(_ROW)

    def __reduce__(self) -> tuple[type[Rows], tuple[None, Dataset]]:
        return Rows, (None, self._table)  # another process reads the file and does not remove it

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Conversation | Rows:
        if isinstance(index, slice):
            return Rows(self._file, self._table.select(range(len(self))[index]))
        return _conversation(**self._conversations[index])

    def __iter__(self) -> Iterator[Conversation]:
        for batch in self._conversations.iter(_READ):
            yield from map(_conversation, *batch.values())

    def passages(self) -> Iterator[Ragged]:
        """Yield the hashes of the passages of a few rows at a time."""
        for batch in self._table.select_columns(["passages"]).with_format("arrow").iter(_READ):
            yield Ragged.from_arrow(batch["passages"])

    def words_as_json(self) -> Iterator[str]:
        """Yield the messages of each row, and its tools and its other answer where it has any, as they are stored."""
        columns = self._table.select_columns(["messages", "tools", "rejected"]).with_format("arrow")
        for batch in columns.iter(_READ):
            for parts in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield "".join(part for part in parts if part is not None)

    def where(self, chosen: numpy.ndarray) -> Rows:
        """Return the rows for which `chosen`, one bool for each row, is true."""
        return Rows(self._file, self._table.select(numpy.flatnonzero(chosen)))

    def dataset(self) -> Dataset:
        """Return ids and labels as a dataset read from disk, which is valid only as long as these rows exist."""
        return self._table.select_columns(["input_ids", "labels"])

    def pairs(self) -> Dataset:
        """Return the rows of preferences as DPOTrainer's collator takes them."""
        return self._conversations.map(_pair, remove_columns=_ROW)


def passages(rows: Sequence[Conversation]) -> Iterator[Ragged]:
    """Yield the hashes of the passages of rows (see words.py), a few rows at a time."""
    if isinstance(rows, Rows):
        yield from rows.passages()
    else:
        yield Batch.of(rows).hashes.passages


class _RowFile:
    """The file, in a folder that is removed when nothing refers to it any more or the process ends.

    A process that was killed leaves the folder, without its lock; the next one that makes a folder removes it.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        folder = tempfile.mkdtemp(prefix=_PREFIX)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.path = str(Path(folder, "rows.arrow"))
        self.remove = weakref.finalize(self, _remove, folder, lock, os.getpid())


def _conversation(
    place: str,
    messages: str,
    tools: str | None,
    input_ids: list[int],
    labels: list[int],
    rejected: str | None,
    rejected_ids: list[int] | None,
    supervised_lost: int,
    truncated: bool,
) -> Conversation:
    encoded, read = Encoded(input_ids, labels), None if tools is None else json.loads(tools)
    said = json.loads(messages)
    return Conversation(place, said, encoded, supervised_lost, truncated, read, rejected, rejected_ids)


def _record(batch: Batch) -> pyarrow.RecordBatch:
    """Return a batch by the names of the schema: the other half of `_conversation`."""
    columns = {
        "place": [row.place for row in batch.rows],
        "messages": [_as_json(row.messages) for row in batch.rows],
        "tools": [None if row.tools is None else _as_json(row.tools) for row in batch.rows],
        "input_ids": batch.encoded.ids.to_arrow(),
        "labels": batch.encoded.labels.to_arrow(),
        "rejected": [row.rejected for row in batch.rows],
        "rejected_ids": batch.rejected_ids,
        "supervised_lost": batch.supervised_lost,
        "truncated": batch.truncated,
        "passages": batch.hashes.passages.to_arrow(),
    }
    arrays = [pyarrow.array(columns[field.name], field.type) for field in _SCHEMA]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _remove(folder: str, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker has a copy of this object and ends before its parent
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # locked, somebody else's, or gone by now
            if time.time() - folder.stat().st_mtime < _UNLOCKED_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for file in (*folder.glob("*.arrow"), *folder.glob("tmp*")):  # ours, and datasets' caches beside it
                    file.unlink()
                folder.rmdir()  # not rmtree: what else is in it is somebody's
            finally:
                os.close(lock)


def write_rows(batches: Iterable[Batch | Sequence[Conversation]]) -> Rows:
    """Write conversations, a batch at a time, and return them all; an error leaves no file behind.

    Raises:
        SetupError: when they cannot be written, for example because the disk is full.
    """
    try:
        file = _RowFile()
        try:
            with pyarrow.OSFile(file.path, "wb") as sink, pyarrow.ipc.new_stream(sink, _SCHEMA) as stream:
                for batch in batches:
                    stream.write_batch(_record(batch if isinstance(batch, Batch) else Batch.of(batch)))
            return Rows(file, Dataset.from_file(file.path))
        except BaseException:
            file.remove()
            raise
    except RecipesError:  # may be an OSError too, but is not about this file
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise SetupError(
            f"the prepared rows cannot be written: {reason}; {_room()}. They take about five times the size of the "
            "data file. Free some space, or set TMPDIR=/path/to/folder to a folder on another disk before the command"
        ) from error


def _room() -> str:
    try:
        folder = tempfile.gettempdir()
        return f"{shutil.disk_usage(folder).free / 2**30:,.2f} GiB are free in {folder}"
    except OSError:
        return "there is no folder for temporary files"
