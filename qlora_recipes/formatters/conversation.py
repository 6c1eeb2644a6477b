"""What a conversation is: which messages may follow which, and what each may hold.

Knows nothing of rows or templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_recipes.formatters.reasons import SHORT, Reason, RowError
from qlora_recipes.formatters.text import check_text, is_visible
from qlora_recipes.formatters.tools import Tools, check_calls, check_tools, strings

Message = dict[str, Any]
"""One turn: `role` is system, developer, user, assistant, tool, or text (a plain text without turns), `content` its
words without the space around them. An assistant's may have `reasoning_content`, `tool_calls`, and `train: False` where
it is not in the loss; a tool's `name` and `tool_call_id`."""

TEXT = "text"
"""The role of a plain text, which is alone in its conversation and wholly in the loss."""
_EMPTY = {
    "system": Reason.EMPTY_SYSTEM,
    "developer": Reason.EMPTY_SYSTEM,
    "user": Reason.EMPTY_QUESTION,
    "assistant": Reason.EMPTY_ANSWER,
    "tool": None,  # a tool may return nothing
    TEXT: Reason.EMPTY_TEXT,
}
_PLAIN = {"role", "content"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What datasets call the thoughts before an answer; the first is what templates read."""
_THOUGHT = re.compile("<think>(.*?)</think>(.*)", re.DOTALL)
_FOLLOWS = {
    "": ("user", "system", "developer", TEXT),
    "system": ("user", "developer"),
    "developer": ("user",),
    "user": ("assistant",),
    "tool": ("tool", "assistant"),
    TEXT: (),
}
"""What may follow a message of each role; an assistant's depends on its calls."""


def check_conversation(found: object, source: str = "format_row") -> tuple[list[Message], Tools | None]:
    """Return messages and tools of what a formatter gave: messages, or an object with `messages` and `tools`.

    Raises:
        RowError: as `check_messages`, and for what are no tools.
    """
    if not isinstance(found, Mapping) or "messages" not in found:
        return check_messages(found, source), None
    return check_messages(found["messages"], source), check_tools(found.get("tools"), f"{source}, tools")


def check_messages(messages: object, source: str = "format_row") -> list[Message]:
    """Return the messages with nothing but what `Message` names, the space around each content cut off.

    A conversation is an optional system or developer message, then user and assistant in turn, an assistant last, none
    of them empty. Between a user and the assistant's answer there may be calls of tools, each followed by its results.
    `source` names where the messages come from.

    Raises:
        RowError: for anything else.
    """
    if not isinstance(messages, list | tuple):
        raise RowError(Reason.NOT_MESSAGES, f"{source} gave {SHORT.repr(messages)}, expected a list of messages")
    checked = [_check_message(message, f"{source}, message {i}") for i, message in enumerate(messages)]
    _check_order(checked, source)
    return checked


def _check_message(message: object, where: str) -> Message:
    """Return one message with its content stripped; `where` starts the error that is raised otherwise."""
    if (
        not isinstance(message, Mapping)
        or "role" not in message
        or ("content" not in message and "tool_calls" not in message)
    ):
        expected = "expected an object with role and content"
        raise RowError(Reason.NOT_MESSAGES, f"{where} is {SHORT.repr(message)}, {expected}")
    role = message["role"]
    if not isinstance(role, str) or role not in _EMPTY:
        known = f"expected one of {', '.join(_EMPTY)}"
        raise RowError(Reason.UNKNOWN_ROLE, f"{where} has the role {SHORT.repr(role)}, {known}")
    more = _check_more(message, role, where) if len(message) > len(_PLAIN) or "content" not in message else {}
    content = message.get("content")
    if content is None and "tool_calls" in more:
        content = ""
    content = check_text(content, f"{where} ({role})").strip()
    if (empty := _EMPTY[role]) and "tool_calls" not in more and not is_visible(content):
        raise RowError(empty, f"{where} ({role}) has no words")
    return {"role": role, "content": content, **more}


def _check_more(message: Mapping[str, Any], role: str, where: str) -> Message:
    """Return what a message has besides role and content; a key that holds None counts as missing."""
    more: Message = {}
    trained = _check_trained(message, where)
    if role == "assistant":
        for key in _REASONING:
            thought = message.get(key)
            if thought is not None and is_visible(check_text(thought, f"{where}, {key}")):
                more.setdefault("reasoning_content", thought.strip())
        if calls := message.get("tool_calls"):
            more["tool_calls"] = check_calls(calls, where)
        if trained is False:
            more["train"] = False
    elif trained:
        raise RowError(Reason.NOT_A_WEIGHT, f"{where} ({role}) has a weight; only an assistant's turn is in the loss")
    elif role == "tool":
        for key in ("name", "tool_call_id"):
            if message.get(key) is not None:
                more[key] = check_text(message[key], f"{where}, {key}")
    return more


def _check_trained(message: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a turn is in the loss, by `weight`, `train` or `mask`; None where it has none of them."""
    said = {}
    for key in ("weight", "train", "mask"):
        if (value := message.get(key)) is not None:
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise RowError(Reason.NOT_A_WEIGHT, f"{where} has {key} {SHORT.repr(value)}, expected 0 or 1")
            said[key] = bool(value) != (key == "mask")  # a masked turn is the one that is not trained
    if len(set(said.values())) > 1:
        raise RowError(Reason.NOT_A_WEIGHT, f"{where} has {' and '.join(said)}, which contradict each other")
    return next(iter(said.values()), None)


def _check_order(messages: Sequence[Message], source: str) -> None:
    """Raise unless the messages are those of a conversation that ends in an answer, or one plain text."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles and roles != [TEXT]:
        raise RowError(Reason.NO_ASSISTANT_TURN, f"{source} gave the roles {SHORT.repr(roles)}")
    expected, calls, answers_tool = _FOLLOWS[""], [], False
    for i, (role, message) in enumerate(zip(roles, messages, strict=True)):
        where = f"{source}, message {i}"
        if role not in expected:
            reason = Reason.NO_CALL if role == "tool" else Reason.ROLES_OUT_OF_ORDER
            raise RowError(reason, f"{where} is {role}, expected {' or '.join(expected) or 'no other'}")
        if role == "assistant":
            calls = message.get("tool_calls", [])
            # after results, an assistant may speak before it calls again, or before it answers
            expected = ("tool",) if calls else ("user", "assistant") if answers_tool else ("user",)
            continue
        expected, answers_tool = _FOLLOWS[role], role == "tool"
        if answers_tool and message.get("tool_call_id") is not None:
            _check_answers_call(message["tool_call_id"], calls, where)
    if roles[-1] not in ("assistant", TEXT):
        raise RowError(Reason.NO_LAST_ANSWER, f"{source}, message {len(roles) - 1} ({roles[-1]}) is the last")
    if not any(is_trained(message) for message in messages):
        raise RowError(Reason.NO_TRAINED_TURN, f"{source} keeps every assistant's turn out of the loss")


def _check_answers_call(call_id: str, calls: Sequence[Message], where: str) -> None:
    known = [call["id"] for call in calls if "id" in call]
    if known and call_id not in known:
        expected = f"expected one of {SHORT.repr(known)}"
        raise RowError(Reason.NO_CALL, f"{where} has the tool_call_id {SHORT.repr(call_id)}, {expected}")


def is_trained(message: Message) -> bool:
    """Whether a message is in the loss: a plain text, or an assistant's turn without `train: False`."""
    return message["role"] == TEXT or (message["role"] == "assistant" and bool(message.get("train", True)))


def before_last_answer(messages: Sequence[Message]) -> list[Message]:
    """Return all that comes before the last turn in the loss: the prompt of a held-out conversation.

    It is empty for a plain text, which has no prompt.
    """
    return list(messages[: max(i for i, message in enumerate(messages) if is_trained(message))])


def split_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with what stands in `<think>` at the start of an answer as its `reasoning_content`.

    Raises:
        RowError: when nothing follows it.
    """
    return [_split(message) if "</think>" in message["content"] else message for message in messages]


def inner_thought(message: Message) -> tuple[str, str] | None:
    """Return what stands in `<think>` at the start of an assistant's content, and what follows it, or None."""
    found = _THOUGHT.fullmatch(message["content"]) if message["role"] == "assistant" else None
    return (found[1].strip(), found[2].strip()) if found else None


def _split(message: Message) -> Message:
    found = inner_thought(message)
    if "reasoning_content" in message or not found:
        return message
    thought, content = found
    if not is_visible(content) and "tool_calls" not in message:
        raise RowError(Reason.EMPTY_ANSWER, f"an answer is {SHORT.repr(message['content'])}, expected words after it")
    return {**message, "content": content, **({"reasoning_content": thought} if is_visible(thought) else {})}


def words_of(message: Message) -> Iterator[str]:
    """Yield every text of a message: its content, its reasoning, and what its calls or its result are called."""
    yield message["content"]
    if len(message) > len(_PLAIN):
        for key in ("reasoning_content", "name", "tool_call_id", "tool_calls"):
            yield from strings(message.get(key))


def answer_of(message: Message) -> str:
    """Return what an assistant's turn says in all: its reasoning, its content, and names and arguments of its calls."""
    if len(message) == len(_PLAIN):
        return str(message["content"])
    calls = [call["function"] for call in message.get("tool_calls", ())]
    said = (text for call in calls for text in (call["name"], *strings(call["arguments"])))
    return "\n".join(filter(None, (message.get("reasoning_content", ""), message["content"], *said)))
