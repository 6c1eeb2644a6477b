"""Formatters: pure functions from one row of a data file to the messages of one conversation.

A formatter returns messages that `check_messages` has accepted, or those and the row's tools as an object with
`messages` and `tools`, or raises `RowError`; any other exception is a bug here. Column names match whatever their case
and the spaces around them; a column that holds None counts as missing.
"""

from qlora_recipes.formatters.columns import alpaca, plain_text, question_answer, unmarked_text
from qlora_recipes.formatters.conversation import (
    TEXT,
    Message,
    answer_of,
    before_last_answer,
    check_conversation,
    check_messages,
    inner_thought,
    is_trained,
    split_reasoning,
    words_of,
)
from qlora_recipes.formatters.detection import FORMATTERS, Formatter, detect
from qlora_recipes.formatters.guanaco import guanaco_llama2, guanaco_text
from qlora_recipes.formatters.preferences import preferences
from qlora_recipes.formatters.reasons import Reason, RowError
from qlora_recipes.formatters.text import Row, folded, is_visible
from qlora_recipes.formatters.tools import Tools, check_tools, strings
from qlora_recipes.formatters.turns import Formatted, messages, prompt_completion, sharegpt

__all__ = [
    "FORMATTERS",
    "TEXT",
    "Formatted",
    "Formatter",
    "Message",
    "Reason",
    "Row",
    "RowError",
    "Tools",
    "alpaca",
    "answer_of",
    "before_last_answer",
    "check_conversation",
    "check_messages",
    "check_tools",
    "detect",
    "folded",
    "guanaco_llama2",
    "guanaco_text",
    "inner_thought",
    "is_trained",
    "is_visible",
    "messages",
    "plain_text",
    "preferences",
    "prompt_completion",
    "question_answer",
    "sharegpt",
    "split_reasoning",
    "strings",
    "unmarked_text",
    "words_of",
]
