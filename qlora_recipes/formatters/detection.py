"""Every formatter under its name, and which of them fits a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qlora_recipes.errors import DataError
from qlora_recipes.formatters.columns import TURN_MARKERS, alpaca, plain_text, question_answer, unmarked_text
from qlora_recipes.formatters.guanaco import guanaco_llama2, guanaco_text
from qlora_recipes.formatters.text import Row, column, filled_columns, is_visible
from qlora_recipes.formatters.turns import Formatted, messages, prompt_completion, sharegpt

Formatter = Callable[[Row], Formatted]

FORMATTERS: dict[str, Formatter] = {
    formatter.__name__: formatter
    for formatter in (
        messages,
        sharegpt,
        prompt_completion,
        alpaca,
        question_answer,
        guanaco_llama2,
        guanaco_text,
        unmarked_text,
        plain_text,
    )
}
"""Every formatter under its name."""

_SHAPES: dict[str, dict[str, str]] = {
    "messages": {"messages": ""},
    "sharegpt": {"conversations": ""},
    "prompt_completion": {"prompt": "", "completion": ""},
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
        values = [(column(row, wanted), start) for wanted, start in shape.items()]
        if all(value is not None and str(value).lstrip().startswith(start) for value, start in values):
            return FORMATTERS[name]
    text = column(row, "text")
    if isinstance(text, str) and is_visible(text) and not TURN_MARKERS.search(text):
        return unmarked_text
    known = "\n".join(f"  {name}: {_describe(shape)}" for name, shape in _SHAPES.items())
    raise DataError(
        f"no formatter fits a row with the columns {filled_columns(row)}. Expected one of these shapes:\n{known}\n"
        "  unmarked_text: text without turns, all of it in the loss; plain_text, where you name it, takes any text\n"
        '  preferences: chosen, rejected, in a recipe with method = "dpo"\n'
        "For data of any other shape, give the recipe a format_row(row) that returns messages."
    )


def _describe(shape: Mapping[str, str]) -> str:
    return ", ".join(f"{name} starting with {start}" if start else name for name, start in shape.items())
