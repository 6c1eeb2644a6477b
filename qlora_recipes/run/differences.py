"""In which keys two records differ: receipts, settings, or what a run was started as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


class Missing(Enum):
    """The value of a key that only one of two records has."""

    MISSING = "nothing"

    def __str__(self) -> str:
        return self.value


MISSING = Missing.MISSING


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key of every leaf in which two nested mappings or dataclasses differ, with both values.

    The value of a key that only one of them has is `MISSING` in the other.
    """
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


def shortened(value: object) -> str:
    """Return a value as text, cut where it is too long for a line of a message."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
