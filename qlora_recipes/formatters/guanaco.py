"""The two forms of the Guanaco rows: finished Llama-2 text, and text with `### Human:`."""

from __future__ import annotations

import re

from qlora_recipes.chat_templates import LLAMA_2_CHAT
from qlora_recipes.formatters.conversation import Message, check_messages
from qlora_recipes.formatters.reasons import SHORT, Reason, RowError
from qlora_recipes.formatters.text import Row, text_of


def guanaco_llama2(row: Row) -> list[Message]:
    """Read the finished Llama-2 text in `text`: `<s>[INST] question [/INST] answer </s>`, turn after turn.

    The first turn may hold `<<SYS>>\\nsystem\\n<</SYS>>\\n\\n` before its question. llama2.jinja renders the
    messages to the same text; a row that it would render differently is rejected.
    """
    text = text_of(row, "text")
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
        raise RowError(Reason.DOES_NOT_PARSE, f"a turn is {SHORT.repr(turn)}, expected <s>[INST] ... [/INST] ...")
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
    before, *turns = re.split("### (Human|Assistant):", text_of(row, "text"))
    if before.strip() or not turns:
        raise RowError(Reason.DOES_NOT_PARSE, f"text starts with {SHORT.repr(before)}, expected ### Human:")
    roles = ["user" if name == "Human" else "assistant" for name in turns[::2]]
    messages = [{"role": role, "content": words} for role, words in zip(roles, turns[1::2], strict=True)]
    return check_messages(messages[:-1] if roles[-1] == "user" else messages, source="text")
