"""Columns of a row, and text that a tokenizer can take."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, cast

from qlora_recipes.formatters.reasons import SHORT, Reason, RowError

Row = Mapping[str, Any]

_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters without a glyph that Unicode counts among letters, marks and symbols, such as fillers."""


def is_visible(text: str) -> bool:
    """Whether a text has a character that shows; spaces of zero width do not, nor do fillers and control characters."""
    if "!" <= text[:1] <= "~":
        return True
    return any(unicodedata.category(letter) not in _INVISIBLE and not _BLANK.match(letter) for letter in text)


def check_text(value: object, where: str) -> str:
    """Return `value` when it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise RowError(Reason.NOT_TEXT, f"{where} is {SHORT.repr(value)}, expected text")
    if "\0" in value or not _is_encodable(value):
        found = cast("re.Match[str]", re.search("[\0\ud800-\udfff]", value))
        raise RowError(Reason.UNENCODABLE, f"{where} holds the character {found.group()!r} at {found.start()}")
    return value


def _is_encodable(text: str) -> bool:
    try:
        text.encode()  # ten times as fast as looking for surrogates
    except UnicodeEncodeError:
        return False
    return True


def check_json(value: object, reason: str, where: str) -> Any:
    """Return a copy of what JSON can hold, every text in it checked."""
    if isinstance(value, str):
        return check_text(value, where)
    if isinstance(value, Mapping):
        return {check_text(key, where): check_json(part, reason, where) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [check_json(part, reason, where) for part in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise RowError(reason, f"{where} holds {SHORT.repr(value)}, expected what JSON can hold")


def column(row: Row, name: str) -> Any:
    """Return the value of the column `name`, or None when it is missing."""
    if not isinstance(row, Mapping):
        raise RowError(Reason.NOT_AN_OBJECT, f"the row is {SHORT.repr(row)}, expected names with values")
    if row.get(name) is not None:
        return row[name]
    alike = (row[key] for key in row if folded(key) == name)
    return next((value for value in alike if value is not None), None)


def folded(column: object) -> str:
    """Return the name of a column by which formatters find it: without its case and the space around it."""
    return str(column).strip().casefold()


def required(row: Row, name: str) -> Any:
    """Return the value of the required column `name`."""
    value = column(row, name)
    if value is None:
        raise RowError(Reason.MISSING_COLUMN, f"expected '{name}', the row has {filled_columns(row)}")
    return value


def filled_columns(row: Row) -> str:
    """Return the names of the columns that hold something, as a message shows them."""
    return SHORT.repr([key for key, value in row.items() if value is not None])


def text_of(row: Row, name: str) -> str:
    """Return the text in the required column `name`."""
    return check_text(required(row, name), name)
