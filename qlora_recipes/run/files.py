"""JSON files of a run folder: written whole or not at all, and typed when they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from qlora_recipes.errors import RunFolderError

Record = TypeVar("Record")


def read_record(file: Path, kind: type[Record], *, fix: str) -> Record:
    """Return the dataclass that a JSON file holds.

    Raises:
        FileNotFoundError: when there is no such file, which means something else for every file.
        RunFolderError: for a file that cannot be read, is no JSON, or lacks a key or has a value of another type.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunFolderError(f"{file} cannot be read: {error.strerror or error}. {fix}") from error
    return decode(text, kind, source=str(file), fix=fix)


def decode(text: bytes | str, kind: type[Record], *, source: str, fix: str) -> Record:
    """Return the dataclass that a JSON text holds; numbers are not taken for text, nor text for numbers.

    Raises:
        RunFolderError: naming the source and the first key at fault.
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False)
        first = faults[0]
        key = ".".join(map(str, first["loc"]))
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        if not key:
            raise RunFolderError(f"{source} is damaged: {first['msg']}. {fix}") from error
        got = "" if first["type"] == "missing" else f": got {_short(first['input'])}"
        raise RunFolderError(f"{source}, key {key}: {first['msg'].lower()}{got}{more}. {fix}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_json(file: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file aside, sync it, and rename it into place, so that a reader never sees half of it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
