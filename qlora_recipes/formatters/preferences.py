"""Rows that hold two answers to one prompt, of which one is preferred."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_recipes.formatters.conversation import Message, check_conversation
from qlora_recipes.formatters.reasons import SHORT, Reason, RowError
from qlora_recipes.formatters.text import Row, column, required


def preferences(row: Row) -> dict[str, Any]:
    """Read `chosen` and `rejected`: two answers to the `prompt`, or two conversations that differ in the last turn.

    The prompt and either answer may be a text or a list of messages. Returns `messages`, which end with the chosen
    answer, `rejected`, the other one's text, and `tools` where the row has them.

    Raises:
        RowError: for anything else, and for answers that are the same.
    """
    prompt = _turns(column(row, "prompt") or [], "user", "prompt")
    chosen, rejected = (_turns(required(row, name), "assistant", name) for name in ("chosen", "rejected"))
    if prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        prompt = []  # both hold it again
    tools = column(row, "tools")
    return pair({"messages": [*prompt, *chosen], "tools": tools}, {"messages": [*prompt, *rejected], "tools": tools})


def pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Return two conversations as one: that which is preferred, and the text of the other's last turn."""
    messages, tools = check_conversation(chosen, "chosen")
    others, _ = check_conversation(rejected, "rejected")
    if messages[:-1] != others[:-1]:
        raise RowError(Reason.NOT_A_PAIR, "chosen and rejected differ before their last turn")
    if any(message.keys() - {"role", "content", "train"} for message in (messages[-1], others[-1])):
        raise RowError(Reason.NOT_A_PAIR, "an answer has more than words; expected no calls and no reasoning")
    answer = others[-1]["content"]
    if messages[-1]["content"] == answer:
        raise RowError(Reason.NOT_A_PAIR, f"chosen and rejected are both {SHORT.repr(answer)}")
    found = {"messages": [*map(_outside_the_loss, messages[:-1]), messages[-1]], "rejected": answer}
    return found if tools is None else {**found, "tools": tools}


def _outside_the_loss(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _turns(value: object, role: str, name: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(Reason.NOT_MESSAGES, f"{name} is {SHORT.repr(value)}, expected a text or a list of messages")
    return list(value)
