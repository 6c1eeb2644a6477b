"""Rows that hold a list of turns, with tools, reasoning and weights where they have any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_recipes.formatters.conversation import Message, check_conversation
from qlora_recipes.formatters.reasons import SHORT, Reason, RowError
from qlora_recipes.formatters.text import Row, column, required

Formatted = list[Message] | dict[str, Any]
"""Messages, or an object with `messages` and `tools`."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""What sharegpt files call the roles, besides the names of the roles themselves."""


def messages(row: Row) -> Formatted:
    """Read `messages`: a list of objects with `role` and `content`, and the schemas in `tools` where the row has them.

    An assistant's turn may have `reasoning_content` (or `thinking`), `tool_calls`, and `weight`, `train` or `mask`.
    """
    return _conversation(row, required(row, "messages"), source="messages")


def sharegpt(row: Row) -> Formatted:
    """Read `conversations`: a list of objects with `from` (human, gpt, chatgpt or a role) and `value`.

    A `function_call` holds calls as JSON and an `observation` their result; a row may have `system` and `tools`.
    """
    turns = required(row, "conversations")
    if not isinstance(turns, list | tuple):
        raise RowError(Reason.NOT_MESSAGES, f"conversations is {SHORT.repr(turns)}, expected a list")
    said = [_sharegpt_message(turn) for turn in turns]
    system = column(row, "system")
    if system and not (said and said[0]["role"] == "system"):
        said.insert(0, {"role": "system", "content": system})
    return _conversation(row, said, source="conversations")


def _sharegpt_message(turn: object) -> dict[str, Any]:
    """Return a turn under our own keys; an unknown speaker keeps its name and is rejected later."""
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        raise RowError(Reason.NOT_MESSAGES, f"a turn is {SHORT.repr(turn)}, expected an object with from and value")
    speaker, value = turn["from"], turn["value"]
    weights = {key: turn[key] for key in ("weight", "train", "mask") if key in turn}
    if speaker == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(value), **weights}
    role = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": value, **weights}


def _calls(value: object) -> object:
    """Return the calls in the text of a turn."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RowError(Reason.NOT_A_CALL, f"a function_call is {SHORT.repr(value)}, expected JSON") from error
    return [calls] if isinstance(calls, Mapping) else calls or [None]


def prompt_completion(row: Row) -> Formatted:
    """Read `prompt` and `completion`: a question and its answer, or two lists of messages, of which only the second
    is in the loss.
    """
    prompt, completion = required(row, "prompt"), required(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list | tuple) or not isinstance(completion, list | tuple):
        found = f"{SHORT.repr(prompt)} and {SHORT.repr(completion)}"
        raise RowError(Reason.NOT_MESSAGES, f"prompt and completion are {found}, expected two texts or two lists")
    turns = [*map(_untrained, prompt), *completion]
    if not any(isinstance(turn, Mapping) and turn.get("role") == "assistant" for turn in completion):
        raise RowError(Reason.NO_ASSISTANT_TURN, f"completion is {SHORT.repr(completion)}")
    return _conversation(row, turns, source="prompt/completion")


def _untrained(turn: object) -> object:
    is_answer = isinstance(turn, Mapping) and turn.get("role") == "assistant"
    return {**turn, "weight": None, "mask": None, "train": False} if isinstance(turn, Mapping) and is_answer else turn


def _conversation(row: Row, turns: object, source: str) -> Formatted:
    """Return checked messages, with the tools of the row where it has any."""
    said, tools = check_conversation({"messages": turns, "tools": column(row, "tools")}, source)
    return said if tools is None else {"messages": said, "tools": tools}
