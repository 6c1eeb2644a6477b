"""Rows whose columns each hold one text: a question, its answer, or a plain text."""

from __future__ import annotations

import re

from qlora_recipes.formatters.conversation import TEXT, Message, check_messages
from qlora_recipes.formatters.reasons import Reason, RowError
from qlora_recipes.formatters.text import Row, column, text_of

TURN_MARKERS = re.compile(
    r"\[/?INST\]|<\|(im_start|im_end|start_header_id|user|assistant|system|start|message|turn)\|?>|<start_of_turn>"
    r"|### ?(Human|Assistant|Instruction|Response|User|Input)\b|(?m:^[ \t]*(Human|Assistant|User|USER|ASSISTANT):)"
)
"""What opens a turn in texts that were finished for some model."""


def question_answer(row: Row) -> list[Message]:
    """Read one question and its answer from the columns `question` and `answer`."""
    return _single_turn(text_of(row, "question"), text_of(row, "answer"), source="question/answer")


def alpaca(row: Row) -> list[Message]:
    """Read `instruction`, `input` and `output`; an input, if any, follows the instruction after a blank line."""
    parts = [text_of(row, "instruction")]
    if column(row, "input") is not None:
        parts.append(text_of(row, "input"))
    question = "\n\n".join(part.strip() for part in parts if part.strip())
    return _single_turn(question, text_of(row, "output"), source="instruction/output")


def _single_turn(question: str, answer: str, source: str) -> list[Message]:
    turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return check_messages(turn, source)


def plain_text(row: Row) -> list[Message]:
    """Read `text` as a text without turns, for continued pretraining: all of it is in the loss, whatever it holds."""
    return check_messages([{"role": TEXT, "content": text_of(row, "text")}], source="text")


def unmarked_text(row: Row) -> list[Message]:
    """Read `text` as `plain_text` does, and refuse a row with turn markers: what `detect` picks."""
    found = TURN_MARKERS.search(text_of(row, "text"))
    if found:
        expected = "expected none; name plain_text as the format_row if all of it should be in the loss"
        raise RowError(Reason.TURN_MARKERS, f"text holds {found.group()!r}, {expected}")
    return plain_text(row)
