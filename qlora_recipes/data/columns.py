"""Which columns a formatter reads, so that what it passes over is named. Knows nothing of files or messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any

_EMPTY: tuple[Any, ...] = (None, "", [], {})


class WatchedRow(dict[Any, Any]):
    """A row that notes which of its values are looked up, also in the objects of its lists, as `messages[].role`."""

    def __init__(self, row: Mapping[Any, Any], root: WatchedRow | None = None, prefix: str = "") -> None:
        super().__init__(row)
        self._root, self._prefix = root or self, prefix
        if root is None:
            self.read: set[str] = set()
            self.filled: list[str] = []
        self._root.filled += [self._place(name) for name, value in row.items() if value not in _EMPTY]

    def __getitem__(self, name: Any) -> Any:
        value, place = super().__getitem__(name), self._place(name)
        self._root.read.add(place)
        if isinstance(value, list) and any(type(item) is dict for item in value):
            value = [WatchedRow(item, self._root, f"{place}[].") if type(item) is dict else item for item in value]
            self[name] = value
        return value

    def get(self, name: Any, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def pop(self, name: Any, *default: Any) -> Any:
        self.get(name)
        return super().pop(name, *default)

    def items(self) -> Any:
        return ItemsView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def copy(self) -> dict[Any, Any]:
        return dict(self.items())

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()  # with a method of its own, dict(row) and {**row} come through __getitem__

    def _place(self, name: Any) -> str:
        return f"{self._prefix}{name}"


class ColumnUse:
    """Which columns of the rows that were used are filled, and which of them were read."""

    def __init__(self) -> None:
        self._filled: Counter[str] = Counter()
        self._read: set[str] = set()

    def add(self, row: object) -> None:
        """Count a row that a formatter has read."""
        if isinstance(row, WatchedRow):
            self._filled.update(row.filled)
            self._read |= row.read

    def unread(self) -> dict[str, int]:
        """Return column to the number of times that it is filled, for those that were read in no row."""
        return {name: count for name, count in self._filled.items() if name not in self._read}
