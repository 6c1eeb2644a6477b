"""JSON files of a run folder: written whole or not at all, and typed when they are read.

Knows nothing of what they hold.
"""

from __future__ import annotations

import json
import os
import stat
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_recipes.errors import RunFolderError
from qlora_recipes.run.differences import shortened

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")
_LARGEST = 2**30


def read_record(file: Path, kind: type[Record], *, fix: str) -> Record:
    """Return the dataclass, or the list or mapping of a type, that a JSON file holds.

    Numbers are not taken for text, nor text for numbers, and every number is finite; `fix` ends every message.

    Raises:
        FileNotFoundError: when there is no such file, which means something else for every file.
        RunFolderError: for a file that cannot be read, is no JSON, has another schema, lacks a key, or has one that is
            unknown or of another type. It names the file and the first such key.
    """
    return _decode(read_bytes(file, fix=fix), kind, str(file), fix)


def read_lines(file: Path, kind: type[Record], *, fix: str) -> list[Record]:
    """Return what a file of JSON lines holds, each as `read_record` does; an error names the line.

    Raises:
        FileNotFoundError: when there is no such file.
        RunFolderError: for a file or a line that cannot be read.
    """
    return decode_lines(read_bytes(file, fix=fix), kind, source=file, fix=fix)


def decode_lines(content: bytes, kind: type[Record], *, source: Path, fix: str) -> list[Record]:
    """Return what JSON lines hold; only a line feed ends one, since a text may hold other line separators.

    Raises:
        RunFolderError: for the first line that is damaged, with its number.
    """
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    return [_decode(line, kind, f"{source}, line {number}", fix) for number, line in enumerate(lines, 1)]


def read_bytes(file: Path, *, fix: str) -> bytes:
    """Return the contents of a file.

    Raises:
        FileNotFoundError: when there is no such file.
        RunFolderError: when it cannot be read, a folder or a pipe among others, or has more than 1 GiB.
    """
    try:
        check_kind(file)
        if (size := file.stat().st_size) > _LARGEST:
            raise OSError(f"it has {size:,} bytes, more than 1 GiB")
        return file.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in a name that another file gave
        raise RunFolderError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}. {fix}") from error


def check_kind(file: Path) -> None:
    """Raise OSError for what is no file and no folder: reading a pipe waits forever, and a device may have no end."""
    if not (stat.S_ISREG(mode := file.stat().st_mode) or stat.S_ISDIR(mode)):
        raise OSError("it is a pipe, a socket or a device")


def _decode(content: bytes, kind: type[Record], source: str, fix: str) -> Record:
    import pydantic

    hashable: Any = kind  # mypy takes no type[Record] for it
    try:
        record: Record | None = _adapter(hashable).validate_json(content)
    except pydantic.ValidationError as error:
        raise RunFolderError(f"{source}{_fault(error)}. {fix}") from error
    if record is None:
        raise RunFolderError(f"{source} is damaged: got null, expected an object. {fix}")
    return record


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return TypeAdapter(kind | None, config=config)  # not `kind` alone: a dataclass takes no settings from outside


def _fault(error: ValidationError) -> str:
    """Say what the first fault is, and how many there are; another schema explains all others."""
    first, *others = sorted(error.errors(include_url=False), key=lambda fault: fault["loc"] != ("schema_version",))
    key, got = ".".join(map(str, first["loc"])), shortened(repr(first["input"]), 60)
    expected = first["msg"].removeprefix("Input should be ")
    if first["type"] == "json_invalid":
        return f" is damaged: {expected[:1].lower()}{expected[1:]}".replace("at line 1 column", "at column")
    if not key:
        return f" is damaged: got {got}, expected {expected}"
    plain = {"missing": "it is missing", "unexpected_keyword_argument": "this version knows no such key"}
    said = plain.get(first["type"], f"got {got}, expected {expected}")
    return f", key {key}: {said}" + (f" (and {len(others)} more)" if others else "")


def write_json(file: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file under another name, sync it, and rename it, so that a reader never sees half of it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
