"""Rows from a JSON, JSONL, CSV or Parquet file, or from the hub, each with its place in the source.

All are read a few rows at a time, except a JSON list, which is loaded whole: save a million rows as JSON lines.
Knows nothing of conversations.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_recipes.errors import DataError, nearest

_PARQUET_ROWS = 500  # converted to Python objects at once; upstream converts 65,536
_PARQUET_BYTES = 2**20  # read at once from a column; upstream reads a whole row group, 209 MiB for a file of 163
Rows = Iterator[tuple[str, Any]]
"""Pairs of a place, such as `line 3`, and the row found there."""


def read_rows(source: str, *, split: str = "train", revision: str | None = None) -> Rows:
    """Yield every row of a file or of one split of a hub dataset, in order.

    Raises:
        DataError: when the source is missing, empty or broken, naming the line if there is one.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.exists():
        raise DataError(f"{source} is not a data file; expected one that ends in {', '.join(_READERS)}")
    if reader is None:
        return _hub_rows(source, split, revision)
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no file at {source}.{nearest(path.name, siblings)}")
    return _checked(path, reader)


def _checked(path: Path, reader: Callable[[Path], Rows]) -> Rows:
    """Yield the rows; errors name the file, and a file without a row is an error."""
    empty = True
    try:
        for place, row in reader(path):
            empty = False
            yield place, row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{path} has no rows; expected at least one")


def _json_rows(path: Path) -> Rows:
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


def _jsonl_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Return a JSON document, which is the whole file or one line of it."""
    where = f"{path}, line {line}" if line else str(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line or error.lineno}, column {error.colno}"
        raise DataError(f"{where}: broken JSON, {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{where}: lists or objects are nested too deeply, expected names with values") from error
    except ValueError as error:
        reason = f"a number is too long to be read, expected text in quotes ({_first_line(error)})"
        raise DataError(f"{where}: {reason}") from error


def _csv_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        csv.field_size_limit(2**31 - 1)  # 131,072 by default; a row that is too long is counted, not refused
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            line = reader.reader.line_num  # DictReader's own number counts only complete rows
            raise DataError(f"{path}, line {line}: broken CSV, {error}") from error


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BYTES).iter_batches(_PARQUET_ROWS)
        rows = (row for batch in batches for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield f"row {index}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


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
    for index, row in enumerate(rows):
        yield f"row {index}", row


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
