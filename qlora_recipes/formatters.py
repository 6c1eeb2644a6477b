"""Formatters: pure functions from one row of a data file to the messages of one conversation.

A formatter returns messages that `check_messages` has accepted, or raises `RowError`; any other exception is a bug
here. Column names match whatever their case and the spaces around them; a column that holds None counts as missing.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from qlora_recipes.chat_templates import LLAMA_2_CHAT
from qlora_recipes.errors import DataError

Message = dict[str, str]
"""One turn: `role` is system, user or assistant, `content` its words without the space around them."""

Row = Mapping[str, Any]
Formatter = Callable[[Row], list[Message]]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""What sharegpt files call the roles, besides the names of the roles themselves."""

_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters without a glyph that Unicode counts among letters, marks and symbols, such as fillers."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = 20


class Reason:
    """Why a row cannot be used. Receipts count rows under these words, so they never change."""

    NOT_AN_OBJECT = "not an object"
    MISSING_COLUMN = "missing column"
    NOT_TEXT = "not text"
    NOT_MESSAGES = "not messages"
    UNENCODABLE = "unencodable text"
    DOES_NOT_PARSE = "does not parse"
    CONTROL_STRING = "control string"
    TEMPLATE = "refused by the template"
    UNKNOWN_ROLE = "unknown role"
    ROLES_OUT_OF_ORDER = "roles out of order"
    NO_ASSISTANT_TURN = "no assistant turn"
    NO_LAST_ANSWER = "ends without an answer"
    EMPTY_SYSTEM = "empty system"
    EMPTY_QUESTION = "empty question"
    EMPTY_ANSWER = "empty answer"


_EMPTY = {"system": Reason.EMPTY_SYSTEM, "user": Reason.EMPTY_QUESTION, "assistant": Reason.EMPTY_ANSWER}


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


def check_messages(messages: object, source: str = "format_row") -> list[Message]:
    """Return the messages with nothing but `role` and `content`, the space around each content cut off.

    A conversation is an optional system message, then user and assistant in turn, an assistant last, none of
    them empty. `source` names where the messages come from.

    Raises:
        RowError: for anything else.
    """
    if not isinstance(messages, list | tuple):
        raise RowError(Reason.NOT_MESSAGES, f"{source} gave {_SHORT.repr(messages)}, expected a list of messages")
    checked = [_check_message(message, f"{source}, message {i}") for i, message in enumerate(messages)]
    _check_order([message["role"] for message in checked], source)
    return checked


def _check_message(message: object, where: str) -> Message:
    """Return one message with its content stripped; `where` starts the error that is raised otherwise."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        expected = "expected an object with role and content"
        raise RowError(Reason.NOT_MESSAGES, f"{where} is {_SHORT.repr(message)}, {expected}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in _EMPTY:
        known = f"expected one of {', '.join(_EMPTY)}"
        raise RowError(Reason.UNKNOWN_ROLE, f"{where} has the role {_SHORT.repr(role)}, {known}")
    content = _check_text(content, f"{where} ({role})").strip()
    if not is_visible(content):
        raise RowError(_EMPTY[role], f"{where} ({role}) has no words")
    return {"role": role, "content": content}


def is_visible(text: str) -> bool:
    """Whether a text has a character that shows; spaces of zero width do not, nor do fillers and control characters."""
    return any(unicodedata.category(letter) not in _INVISIBLE and not _BLANK.match(letter) for letter in text)


def _check_text(value: object, where: str) -> str:
    """Return `value` when it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise RowError(Reason.NOT_TEXT, f"{where} is {_SHORT.repr(value)}, expected text")
    if found := re.search("[\0\ud800-\udfff]", value):
        raise RowError(Reason.UNENCODABLE, f"{where} holds the character {found.group()!r} at {found.start()}")
    return value


def _check_order(roles: list[str], source: str) -> None:
    """Raise unless the roles are those of a conversation that ends in an answer."""
    if "assistant" not in roles:
        raise RowError(Reason.NO_ASSISTANT_TURN, f"{source} gave the roles {_SHORT.repr(roles)}")
    start = 1 if roles[0] == "system" else 0
    for i, role in enumerate(roles[start:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise RowError(Reason.ROLES_OUT_OF_ORDER, f"{source}, message {i + start} is {role}, expected {expected}")
    if roles[-1] != "assistant":
        raise RowError(Reason.NO_LAST_ANSWER, f"{source}, message {len(roles) - 1} is the last, and a question")


def guanaco_llama2(row: Row) -> list[Message]:
    """Read the finished Llama-2 text in `text`: `<s>[INST] question [/INST] answer </s>`, turn after turn.

    The first turn may hold `<<SYS>>\\nsystem\\n<</SYS>>\\n\\n` before its question. llama2.jinja renders the
    messages to the same text; a row that it would render differently is rejected.
    """
    text = _text(row, "text")
    *turns, rest = text.split("</s>")
    if rest.rstrip().endswith("[/INST]"):
        raise RowError(Reason.NO_LAST_ANSWER, f"text ends with {rest[-60:]!r}, expected an answer and </s>")
    if rest or not turns:
        raise RowError(Reason.DOES_NOT_PARSE, f"text ends with {rest[-60:]!r}, expected </s>")
    first, *others = [message for turn in turns for message in _llama2_turn(turn)]
    messages = check_messages([*_llama2_system(first), *others], source="text")
    for i, message in enumerate(messages):  # after a marker, nothing tells who is speaking
        marker = "<s>" if "<s>" in message["content"] else LLAMA_2_CHAT.forged_marker(message["content"])
        if marker:
            raise RowError(Reason.CONTROL_STRING, f"text, message {i} ({message['role']}) holds {marker}")
    if _llama2_text(messages) != text:
        expected = "`<s>[INST] question [/INST] answer </s>`"
        raise RowError(Reason.DOES_NOT_PARSE, f"text has other spaces between its parts than {expected}")
    return messages


def _llama2_turn(turn: str) -> list[Message]:
    """Split `<s>[INST] question [/INST] answer`, without its `</s>`; the spaces stay."""
    question, closed, answer = turn.removeprefix("<s>[INST]").partition("[/INST]")
    if not turn.startswith("<s>[INST]") or not closed:
        raise RowError(Reason.DOES_NOT_PARSE, f"a turn is {_SHORT.repr(turn)}, expected <s>[INST] ... [/INST] ...")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _llama2_system(first: Message) -> list[Message]:
    """Split the system block, where there is one, from the first question."""
    if not first["content"].startswith(" <<SYS>>"):
        return [first]
    system, closed, question = first["content"].removeprefix(" <<SYS>>").partition("<</SYS>>")
    if not closed:
        raise RowError(Reason.DOES_NOT_PARSE, "text has <<SYS>> without <</SYS>>")
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _llama2_text(messages: list[Message]) -> str:
    """Return what llama2.jinja renders, without a Jinja environment; a test keeps the two in step."""
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        contents = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}", *contents[2:]]
    pairs = zip(contents[::2], contents[1::2], strict=True)
    return "".join(f"<s>[INST] {question} [/INST] {answer} </s>" for question, answer in pairs)


def guanaco_text(row: Row) -> list[Message]:
    """Read `### Human: question### Assistant: answer` in `text`, turn after turn.

    The separators count wherever they stand, since the data has them right after the last word, as in
    `C#### Human:`. A last question without an answer is left out: nothing of it would be in the loss.
    """
    before, *turns = re.split("### (Human|Assistant):", _text(row, "text"))
    if before.strip() or not turns:
        raise RowError(Reason.DOES_NOT_PARSE, f"text starts with {_SHORT.repr(before)}, expected ### Human:")
    roles = ["user" if name == "Human" else "assistant" for name in turns[::2]]
    messages = [{"role": role, "content": words} for role, words in zip(roles, turns[1::2], strict=True)]
    return check_messages(messages[:-1] if roles[-1] == "user" else messages, source="text")


def question_answer(row: Row) -> list[Message]:
    """Read one question and its answer from the columns `question` and `answer`."""
    return _single_turn(_text(row, "question"), _text(row, "answer"), source="question/answer")


def alpaca(row: Row) -> list[Message]:
    """Read `instruction`, `input` and `output`; an input, if any, follows the instruction after a blank line."""
    parts = [_text(row, "instruction")]
    if _column(row, "input") is not None:
        parts.append(_text(row, "input"))
    question = "\n\n".join(part.strip() for part in parts if part.strip())
    return _single_turn(question, _text(row, "output"), source="instruction/output")


def sharegpt(row: Row) -> list[Message]:
    """Read `conversations`: a list of objects with `from` (human, gpt, chatgpt or a role) and `value`."""
    turns = _required(row, "conversations")
    if not isinstance(turns, list | tuple):
        raise RowError(Reason.NOT_MESSAGES, f"conversations is {_SHORT.repr(turns)}, expected a list")
    return check_messages([_sharegpt_message(turn) for turn in turns], source="conversations")


def _sharegpt_message(turn: object) -> dict[str, Any]:
    """Return a turn under our own keys; an unknown speaker keeps its name and is rejected later."""
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        raise RowError(Reason.NOT_MESSAGES, f"a turn is {_SHORT.repr(turn)}, expected an object with from and value")
    speaker = turn["from"]
    return {"role": _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker, "content": turn["value"]}


def messages(row: Row) -> list[Message]:
    """Read `messages`: a list of objects with `role` (system, user or assistant) and `content`."""
    return check_messages(_required(row, "messages"), source="messages")


def _single_turn(question: str, answer: str, source: str) -> list[Message]:
    turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return check_messages(turn, source)


def _column(row: Row, name: str) -> Any:
    """Return the value of the column `name`, or None when it is missing."""
    if not isinstance(row, Mapping):
        raise RowError(Reason.NOT_AN_OBJECT, f"the row is {_SHORT.repr(row)}, expected names with values")
    if row.get(name) is not None:
        return row[name]
    alike = (row[key] for key in row if folded(key) == name)
    return next((value for value in alike if value is not None), None)


def folded(column: object) -> str:
    """Return the name of a column by which formatters find it: without its case and the space around it."""
    return str(column).strip().casefold()


def _required(row: Row, name: str) -> Any:
    """Return the value of the required column `name`."""
    value = _column(row, name)
    if value is None:
        raise RowError(Reason.MISSING_COLUMN, f"expected '{name}', the row has {_filled_columns(row)}")
    return value


def _filled_columns(row: Row) -> str:
    return _SHORT.repr([key for key, value in row.items() if value is not None])


def _text(row: Row, name: str) -> str:
    """Return the text in the required column `name`."""
    return _check_text(_required(row, name), name)


FORMATTERS: dict[str, Formatter] = {
    formatter.__name__: formatter
    for formatter in (messages, sharegpt, alpaca, question_answer, guanaco_llama2, guanaco_text)
}
"""Every formatter under its name."""

_SHAPES: dict[str, dict[str, str]] = {
    "messages": {"messages": ""},
    "sharegpt": {"conversations": ""},
    "alpaca": {"instruction": "", "output": ""},
    "question_answer": {"question": "", "answer": ""},
    "guanaco_llama2": {"text": "<s>[INST]"},
    "guanaco_text": {"text": "### Human:"},
}
"""The columns of a formatter's rows, each with what its text starts with, in the order that `detect` tries them."""


def detect(row: Row) -> Formatter:
    """Return the formatter that fits a row's columns.

    Raises:
        DataError: when none does, with the shapes that are known.
    """
    for name, shape in _SHAPES.items():
        values = [(_column(row, column), start) for column, start in shape.items()]
        if all(value is not None and str(value).lstrip().startswith(start) for value, start in values):
            return FORMATTERS[name]
    known = "\n".join(f"  {name}: {_describe(shape)}" for name, shape in _SHAPES.items())
    raise DataError(
        f"no formatter fits a row with the columns {_filled_columns(row)}. Expected one of these shapes:\n{known}\n"
        "For data of any other shape, give the recipe a format_row(row) that returns messages."
    )


def _describe(shape: Mapping[str, str]) -> str:
    return ", ".join(f"{name} starting with {start}" if start else name for name, start in shape.items())
