"""Rows from a JSON, JSONL, CSV or Parquet file, or from the hub, each with its place in the source.

All are read a few rows at a time, except a JSON list, which is loaded whole: save a million rows as JSON lines.
Knows nothing of conversations.
"""

from __future__ import annotations

import csv
import json
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_recipes.errors import DataError, nearest
from qlora_recipes.formatters import folded

_PARQUET_ROWS = 500  # converted to Python objects at once; upstream converts 65,536
_PARQUET_BYTES = 2**20  # read at once from a column; upstream reads a whole row group, 209 MiB for a file of 163
KINDS = {"d": "a folder", "p": "a FIFO", "c": "a device", "b": "a device", "s": "a socket"}
"""What is no file, by the first letter that `stat.filemode` gives it."""
_Placed = Iterable[tuple[str, Any]]


class Rows(Iterator[tuple[str, Any]]):
    """Pairs of a place, such as `line 3`, and the row found there."""

    def __init__(self, rows: _Placed, revision: str | None = None) -> None:
        self._rows = iter(rows)
        self.revision = revision
        """Commit of a hub dataset; None for a file, and where it is not known."""

    def __next__(self) -> tuple[str, Any]:
        return next(self._rows)


def read_rows(source: str, *, split: str = "train", revision: str | None = None) -> Rows:
    """Return every row of a file or of one split of a hub dataset, in order.

    Raises:
        DataError: when the source is missing, empty or broken, naming the line if there is one. What is wrong further
            down in a file is raised when it is reached.
    """
    if "://" in source:
        raise DataError(f"{source} is a URL; expected a hub id or a file, so download it first")
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    try:
        kind = stat.filemode(path.stat().st_mode)[0]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if reader is None and not path.is_absolute():
            return _hub_rows(source, split, revision)
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no file at {source}.{nearest(path.name, siblings)}") from error
    if reader is None or kind in KINDS:
        found = f"{KINDS[kind]}; expected a file" if kind in KINDS else "not a data file; expected one"
        raise DataError(f"{source} is {found} that ends in {', '.join(_READERS)}")
    return Rows(_checked(path, reader))


def _checked(path: Path, reader: Callable[[Path], _Placed]) -> _Placed:
    """Yield the rows; errors name the file, and a file without a row is an error."""
    empty = True
    try:
        for place, row in _with_distinct_columns(reader(path), str(path)):
            empty = False
            yield place, row
    except UnicodeDecodeError as error:
        raise DataError(f"{_not_utf8(path)}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{path} has no rows; expected at least one")


def _not_utf8(path: Path) -> str:
    """Say where the first byte is that is not UTF-8; a decoder knows its place in the buffer only."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"{path}, line {number} is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}"
    return f"{path} is not UTF-8"


def _with_distinct_columns(rows: _Placed, source: str) -> _Placed:
    """Yield the rows; two columns that formatters would find by one name are an error."""
    distinct: set[tuple[Any, ...]] = set()
    for place, row in rows:
        if isinstance(row, dict) and (columns := tuple(row)) not in distinct:
            _check_distinct(columns, f"{source}, {place}")
            distinct.add(columns)
        yield place, row


def _check_distinct(columns: Iterable[Any], where: str) -> None:
    """Refuse two columns whose names are equal but for case and the space around them."""
    seen: dict[str, Any] = {}
    for column in columns:
        if (name := folded(column)) in seen:
            found = f"the columns {seen[name]!r} and {column!r}"
            raise DataError(f"{where}: {found} are one to a formatter; rename or remove one of them")
        seen[name] = column


def _json_rows(path: Path) -> _Placed:
    """Read a list of objects, one object with such a list under one key, or one object per line."""
    if _is_json_lines(path):
        yield from _jsonl_rows(path)
        return
    content = _parsed(path.read_text(encoding="utf-8-sig"), path)
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        if len(lists) != 1:
            found = f"lists under {', '.join(lists)}" if lists else f"the keys {', '.join(list(content)[:8])}"
            raise DataError(f"{path} is one object with {found}; expected a list of rows, or such a list under one key")
        content = content[lists[0]]
    if not isinstance(content, list):
        raise DataError(f"{path} holds {type(content).__name__}; expected a list of rows")
    for index, row in enumerate(content):
        yield f"row {index}", row


def _is_json_lines(path: Path) -> bool:
    """Whether a file has several lines with text, the first of which is a complete JSON document."""
    with path.open("rb") as lines:
        filled = (line for line in lines if line.strip())
        first, second = next(filled, b""), next(filled, None)
    if second is None:
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _jsonl_rows(path: Path) -> _Placed:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Return a JSON document, which is the whole file or one line of it."""
    where = f"{path}, line {line}" if line else str(path)
    try:
        return _DECODER.decode(text)
    except _KeyTwiceError as error:
        raise DataError(f"{where}: {error}") from error
    except json.JSONDecodeError as error:
        where = f"{path}, line {line or error.lineno}, column {error.colno}"
        raise DataError(f"{where}: broken JSON, {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{where}: lists or objects are nested too deeply, expected names with values") from error
    except ValueError as error:
        reason = f"a number is too long to be read, expected text in quotes ({_first_line(error)})"
        raise DataError(f"{where}: {reason}") from error


class _KeyTwiceError(ValueError):
    """A JSON object with one key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; json itself keeps the last value of a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        values = " and ".join(reprlib.repr(value) for name, value in pairs if name == key)
        raise _KeyTwiceError(f"the key {key!r} is in one object twice, with {values}; remove one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads makes one for every text


def _csv_rows(path: Path) -> _Placed:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        csv.field_size_limit(2**31 - 1)  # 131,072 by default; a row that is too long is counted, not refused
        reader = csv.reader(lines, strict=True)
        try:
            header = next(filter(None, reader), [])
            _check_header(header, f"{path}, line {reader.line_num}")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    columns = f"{', '.join(header[:8])}{', ...' if len(header) > 8 else ''}"
                    raise DataError(
                        f"{path}, line {line}: {len(cells)} cells, expected {len(header)} ({columns}). "
                        'A cell that holds a comma or a line break must stand in quotes: "like this, here"'
                    )
                if cells:  # a blank line has none
                    yield f"line {line}", dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: broken CSV, {error}") from error


def _check_header(header: list[str], where: str) -> None:
    _check_distinct(header, where)
    names = "".join(header)
    if "\0" in names:
        raise DataError(f"{where} holds the character '\\x00', as UTF-16 does; save the file as UTF-8")
    if len(header) == 1 and (found := re.search("[;\t|]", names)):
        raise DataError(f"{where}: the columns are separated by {found.group()!r}, expected commas")


def _parquet_rows(path: Path) -> _Placed:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BYTES)
        _check_distinct(file.schema_arrow.names, str(path))  # a row as a dict keeps one of two
        rows = (row for batch in file.iter_batches(_PARQUET_ROWS) for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield f"row {index}", _without_filled(row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def _without_filled(value: Any, nested: bool = False) -> Any:
    """Return a row without the None in its objects: Arrow gives every object of a column all keys of any of them.

    Without this, the arguments of a tool's call would name the arguments of every other tool.
    """
    if isinstance(value, dict):
        return {
            name: _without_filled(part, True) if isinstance(part, dict | list) else part
            for name, part in value.items()
            if part is not None or not nested
        }
    if isinstance(value, list):
        return [_without_filled(part, True) for part in value]
    return value


def _hub_rows(source: str, split: str, revision: str | None) -> Rows:
    import datasets
    import huggingface_hub.errors as hub

    try:
        rows = datasets.load_dataset(source, split=split, revision=revision)
    except hub.GatedRepoError as error:
        raise DataError(
            f"the dataset {source} is gated; accept its terms on the hub, then run: hf auth login"
        ) from error
    except (OSError, ValueError, hub.HfHubHTTPError, RuntimeError) as error:
        raise DataError(
            f"no dataset {source!r} (split {split!r}) could be loaded: {_first_line(error)}. Expected a hub id that "
            f"can be reached, or a local file that ends in {', '.join(_READERS)}"
        ) from error
    placed = ((f"row {index}", _without_filled(row)) for index, row in enumerate(rows))
    return Rows(_with_distinct_columns(placed, source), _commit(rows))


def _commit(rows: Any) -> str | None:
    """Return the commit that a hub dataset was made from, which is the name of its folder in the cache."""
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    return folder if len(folders) == 1 and re.fullmatch("[0-9a-f]{40}", folder := folders.pop()) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


_READERS: dict[str, Callable[[Path], _Placed]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
