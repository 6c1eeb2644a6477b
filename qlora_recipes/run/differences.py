"""In which keys two records differ: receipts, settings, or what a run was started as. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


class _Missing:
    def __str__(self) -> str:
        return "nothing"


MISSING = _Missing()
"""The value of a key that only one of two records has."""


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key of every leaf in which two nested mappings or dataclasses differ, with both values."""
    if (left := _parts(one)) is not None and (right := _parts(other)) is not None:
        for name in dict.fromkeys([*left, *right]):
            inner = f"{key}.{name}" if key else str(name)
            yield from differences(left.get(name, MISSING), right.get(name, MISSING), inner)
    elif one != other:
        yield key, one, other


def _parts(value: Any) -> Mapping[str, Any] | None:
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value if isinstance(value, Mapping) else None


def shortened(value: object, length: int = 80) -> str:
    """Return a value as text, cut where it is too long for a line of a message."""
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."
