"""Prompts from a file, each with its place in it: lines of text, or rows with a prompt or messages.

Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError, nearest
from qlora_recipes.formatters import Message, Tools, check_messages, check_tools

_KEYS = ("prompt", "messages", "tools", "adapter")


@dataclass(frozen=True)
class Prompt:
    """One conversation that ends with a question."""

    place: str
    messages: list[Message]
    adapter: str | None = None
    """The run that is asked; None asks all of them and the base."""
    tools: Tools | None = None
    """What the assistant may call."""


def read_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a file: of `.txt` every line that is not empty, of a data file every row.

    A row has `prompt` (a text) or `messages` (as in training, up to the question), and may have
    `tools` and name its `adapter`.

    Raises:
        DataError: when the file cannot be read or holds none, or for a row of another shape, naming it.
    """
    if file.suffix.lower() != ".txt":
        return [_prompt(f"{file}, {place}", row) for place, row in read_rows(str(file))]
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    prompts = [_prompt(f"{file}, line {i}", {"prompt": line}) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f"{file} has no line with a prompt; expected one a line")
    return prompts


def _prompt(place: str, row: Any) -> Prompt:
    given = {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else {}
    if unknown := next((key for key in given if key not in _KEYS), None):
        raise DataError(f"{place}: got the key {unknown!r}, expected {', '.join(_KEYS)}.{nearest(unknown, _KEYS)}")
    if ("prompt" in given) == ("messages" in given):
        raise DataError(f"{place}: got {sorted(given) or repr(row)[:60]}, expected either prompt or messages")
    messages = given.get("messages", [{"role": "user", "content": given.get("prompt")}])
    if not isinstance(messages, list) or not isinstance(given.get("adapter", ""), str):
        raise DataError(f"{place}: got {repr(row)[:80]}, expected messages in a list and a name as adapter")
    try:  # a conversation is checked with its answer
        checked = check_messages([*messages, {"role": "assistant", "content": "answer"}], "messages")
        tools = check_tools(given.get("tools"), "tools")
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    return Prompt(place, checked[:-1], given.get("adapter"), tools)
