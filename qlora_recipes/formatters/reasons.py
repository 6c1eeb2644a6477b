"""Why a row cannot be used, in words that receipts count rows under."""

from __future__ import annotations

import reprlib

from qlora_recipes.errors import DataError

SHORT = reprlib.Repr()
"""Shows a value of a row in a message, cut where it is long."""
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlist = 20


class Reason:
    """Why a row cannot be used. Receipts count rows under these words, so they never change."""

    NOT_AN_OBJECT = "not an object"
    MISSING_COLUMN = "missing column"
    NOT_TEXT = "not text"
    NOT_MESSAGES = "not messages"
    NOT_TOOLS = "not tools"
    NOT_A_CALL = "not a tool call"
    NOT_A_WEIGHT = "not a weight"
    UNENCODABLE = "unencodable text"
    DOES_NOT_PARSE = "does not parse"
    CONTROL_STRING = "control string"
    TURN_MARKERS = "turn markers in a plain text"
    UNKNOWN_ROLE = "unknown role"
    ROLES_OUT_OF_ORDER = "roles out of order"
    NO_CALL = "tool result without a call"
    NO_ASSISTANT_TURN = "no assistant turn"
    NO_TRAINED_TURN = "no turn in the loss"
    NO_LAST_ANSWER = "ends without an answer"
    EMPTY_SYSTEM = "empty system"
    EMPTY_QUESTION = "empty question"
    EMPTY_ANSWER = "empty answer"
    EMPTY_TEXT = "empty text"
    LEFT_OUT = "left out by the template"
    TEMPLATE = "refused by the template"
    NOT_A_PAIR = "no two answers to one prompt"


class RowError(DataError):
    """A row that cannot be used: `reason` is what it is counted under, `detail` what was got and expected.

    Your own `format_row` may raise it too, with another reason.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling between worker processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
