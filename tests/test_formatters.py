"""Formatters: which rows give which messages, and why the others are refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_recipes.chat_templates import LLAMA_2_CHAT
from qlora_recipes.errors import DataError
from qlora_recipes.formatters import (
    FORMATTERS,
    Formatter,
    Message,
    Reason,
    RowError,
    alpaca,
    check_conversation,
    check_messages,
    detect,
    guanaco_llama2,
    guanaco_text,
    is_visible,
    messages,
    plain_text,
    preferences,
    prompt_completion,
    question_answer,
    sharegpt,
    unmarked_text,
)

REASONS = {value for name, value in vars(Reason).items() if name.isupper()}
CONTROL_STRINGS = ("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
SEPARATORS = ("### Human:", "### Assistant:")
quick = settings(deadline=None, derandomize=True, max_examples=150)


def conversation(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": words} for i, words in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def render_llama2(turns: list[Message]) -> str:
    rendered, _ = render_jinja_template([turns], chat_template=LLAMA_2_CHAT.source, bos_token="<s>", eos_token="</s>")
    return rendered[0]


def test_the_reasons_are_pinned() -> None:
    """Receipts of different versions are compared by these words."""
    assert sorted(REASONS) == [
        "control string",
        "does not parse",
        "empty answer",
        "empty question",
        "empty system",
        "empty text",
        "ends without an answer",
        "left out by the template",
        "missing column",
        "no assistant turn",
        "no turn in the loss",
        "no two answers to one prompt",
        "not a tool call",
        "not a weight",
        "not an object",
        "not messages",
        "not text",
        "not tools",
        "refused by the template",
        "roles out of order",
        "tool result without a call",
        "turn markers in a plain text",
        "unencodable text",
        "unknown role",
    ]


def test_row_error_is_a_data_error_that_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RowError(Reason.NOT_TEXT, "answer is 3, expected text")))
    assert isinstance(error, DataError)
    assert (error.reason, error.detail) == ("not text", "answer is 3, expected text")
    assert str(error) == "not text: answer is 3, expected text"


def turns(*pairs: tuple[object, object], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


LLAMA2 = "<s>[INST] Hi [/INST] Hello. </s>"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": [1, null]}'}}],
}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, None]}}}],
}


def called(**changed: Any) -> dict[str, Any]:
    """Return a turn with one call, of which something is another."""
    call_id = {"id": changed.pop("id")} if "id" in changed else {}
    return {**CALLED, "tool_calls": [{**call_id, "function": {"name": "f", "arguments": {}, **changed}}]}


RESULT = {"role": "tool", "content": "", "name": "f"}
ANSWER = {"role": "assistant", "content": "A"}
GOOD_ROWS: list[tuple[Formatter, dict[Any, Any], Any]] = [
    (guanaco_llama2, {"text": LLAMA2}, conversation("Hi", "Hello.")),
    (guanaco_llama2, {"text": LLAMA2 * 3}, conversation(*["Hi", "Hello."] * 3)),
    (
        guanaco_llama2,
        {"text": "<s>[INST] <<SYS>>\nBe\n\nkind.\n<</SYS>>\n\nHi\nyou [/INST] A\n\n  b </s>" + LLAMA2},
        conversation("Hi\nyou", "A\n\n  b", "Hi", "Hello.", system="Be\n\nkind."),
    ),
    (guanaco_text, {"text": "### Human: Hi### Assistant: Hello."}, conversation("Hi", "Hello.")),
    (guanaco_text, {"text": "### Human: Hi\n### Assistant: Hello.\n"}, conversation("Hi", "Hello.")),
    (
        guanaco_text,
        {"text": "### Human: C#### Assistant: ## Yes### Human: b### Assistant: B"},
        conversation("C#", "## Yes", "b", "B"),
    ),
    (guanaco_text, {"text": "### Human: a### Assistant: A### Human: b"}, conversation("a", "A")),
    (guanaco_text, {"text": "### Human: a### Assistant: A### Human:"}, conversation("a", "A")),
    (question_answer, {"question": " Why? ", "answer": "So.\n", "id": 7}, conversation("Why?", "So.")),
    (question_answer, {"Question": "Why?", " ANSWER ": "So.", None: 1}, conversation("Why?", "So.")),
    (question_answer, {"Question": "no", "question": "Why?", "answer": "So."}, conversation("Why?", "So.")),
    (question_answer, {"Question": None, "QUESTION": "Why?", "answer": "So."}, conversation("Why?", "So.")),
    (alpaca, {"instruction": "Add", "input": "1 2", "output": "3"}, conversation("Add\n\n1 2", "3")),
    (alpaca, {"instruction": "Add", "input": " ", "output": "3"}, conversation("Add", "3")),
    (alpaca, {"instruction": "Add", "input": None, "output": "3"}, conversation("Add", "3")),
    (alpaca, {"instruction": "Add", "output": "3"}, conversation("Add", "3")),
    (
        sharegpt,
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "A", "weight": 1},
                {"from": "user", "value": "b"},
                {"from": "chatgpt", "value": "B"},
            ]
        },
        conversation("a", "A", "b", "B", system="S"),
    ),
    (
        sharegpt,
        {"conversations": ({"from": "user", "value": "a"}, {"from": "assistant", "value": "A"})},
        conversation("a", "A"),
    ),
    (
        messages,
        {"messages": conversation("a", " A ", "b", "B", system="S\n")},
        conversation("a", "A", "b", "B", system="S"),
    ),
    (
        messages,
        {"messages": [{"role": "user", "content": "a", "name": None}, *conversation("a", "A")[1:]]},
        conversation("a", "A"),
    ),
    (
        messages,
        {"messages": [{"role": "user", "content": "a"}, CALLS, RESULT, ANSWER, ANSWER], "tools": json.dumps([TOOL])},
        {"messages": [{"role": "user", "content": "a"}, CALLED, RESULT, ANSWER, ANSWER], "tools": [TOOL]},
    ),
    (
        messages,
        {"messages": [{"role": "user", "content": "a"}, CALLED, RESULT, RESULT, ANSWER], "tools": [TOOL["function"]]},
        {"messages": [{"role": "user", "content": "a"}, CALLED, RESULT, RESULT, ANSWER], "tools": [TOOL]},
    ),
    (
        messages,
        {"messages": [{"role": "developer", "content": "S"}, *conversation("a"), {**ANSWER, "thinking": " Hm. "}]},
        [{"role": "developer", "content": "S"}, *conversation("a"), {**ANSWER, "reasoning_content": "Hm."}],
    ),
    (
        messages,
        {"messages": [*conversation("a"), {**ANSWER, "weight": 0}, *conversation("b", "B")], "tools": []},
        [*conversation("a"), {**ANSWER, "train": False}, *conversation("b", "B")],
    ),
    (
        messages,
        {"messages": [*conversation("a"), {**ANSWER, "mask": True, "train": 0}, *conversation("b", "B")]},
        [*conversation("a"), {**ANSWER, "train": False}, *conversation("b", "B")],
    ),
    (
        sharegpt,
        {
            "conversations": turns(
                ("human", "a"),
                ("function_call", json.dumps({"name": "f", "arguments": {"x": [1, None]}})),
                ("observation", "3"),
                ("gpt", "A"),
                keys=("from", "value"),
            ),
            "tools": [TOOL],
        },
        {"messages": [*conversation("a"), CALLED, {"role": "tool", "content": "3"}, ANSWER], "tools": [TOOL]},
    ),
    (
        sharegpt,
        {"conversations": turns(("human", "a"), ("gpt", "A"), keys=("from", "value")), "system": "S"},
        conversation("a", "A", system="S"),
    ),
    (prompt_completion, {"prompt": "a", "completion": "A"}, conversation("a", "A")),
    (
        prompt_completion,
        {"prompt": conversation("a", "A", "b"), "completion": conversation("", "B")[1:]},
        [*conversation("a"), {**ANSWER, "train": False}, *conversation("b", "B")],
    ),
    (unmarked_text, {"text": " Once upon a time.\n"}, [{"role": "text", "content": "Once upon a time."}]),
    (plain_text, {"text": "### Human: a"}, [{"role": "text", "content": "### Human: a"}]),
]


@pytest.mark.parametrize(("formatter", "row", "expected"), GOOD_ROWS)
def test_row_gives_messages(formatter: Formatter, row: dict[Any, Any], expected: Any) -> None:
    assert formatter(row) == expected
    said, tools = check_conversation(formatter(row))
    assert check_conversation({"messages": said, "tools": tools}) == (said, tools)
    assert expected in (said, {"messages": said, "tools": tools})


BAD_ROWS: list[tuple[Callable[..., list[Message]], object, str]] = [
    # Any formatter.
    (question_answer, ["Why?", "So."], "not an object"),
    (question_answer, {}, "missing column"),
    (question_answer, {"question": "Why?", "anwser": "So."}, "missing column"),
    (question_answer, {"question": "Why?", "answer": None}, "missing column"),
    (question_answer, {"question": "Why?", "answer": 42}, "not text"),
    (question_answer, {"question": "Why?", "answer": ["So."]}, "not text"),
    (question_answer, {"question": "Why?", "answer": b"So."}, "not text"),
    (question_answer, {"question": " ", "answer": "So."}, "empty question"),
    (question_answer, {"question": "Why?", "answer": "\n\t\u3000"}, "empty answer"),
    (question_answer, {"question": "Why?", "answer": "So.\0"}, "unencodable text"),
    (question_answer, {"question": "Why \ud83d?", "answer": "So."}, "unencodable text"),
    # Alpaca.
    (alpaca, {"instruction": "Add", "input": "1 2"}, "missing column"),
    (alpaca, {"instruction": "Add", "input": 12, "output": "3"}, "not text"),
    (alpaca, {"instruction": "", "input": "", "output": "3"}, "empty question"),
    (alpaca, {"instruction": "Add", "input": "1 2", "output": ""}, "empty answer"),
    # The finished Llama-2 text.
    (guanaco_llama2, {"text": ""}, "does not parse"),
    (guanaco_llama2, {"text": "Hello"}, "does not parse"),
    (guanaco_llama2, {"text": "Hello</s>"}, "does not parse"),
    (guanaco_llama2, {"text": LLAMA2.removeprefix("<s>")}, "does not parse"),
    (guanaco_llama2, {"text": LLAMA2.removesuffix(" </s>")}, "does not parse"),
    (guanaco_llama2, {"text": LLAMA2 + "\n"}, "does not parse"),
    (guanaco_llama2, {"text": " " + LLAMA2}, "does not parse"),
    (guanaco_llama2, {"text": LLAMA2 + " " + LLAMA2}, "does not parse"),
    (guanaco_llama2, {"text": LLAMA2 + "</s>"}, "does not parse"),
    (guanaco_llama2, {"text": "<s>[INST]  Hi [/INST] Hello. </s>"}, "does not parse"),
    (guanaco_llama2, {"text": "<s>[INST] Hi[/INST] Hello. </s>"}, "does not parse"),
    (guanaco_llama2, {"text": "<s>[INST] Hi [/INST] Hello.</s>"}, "does not parse"),
    (guanaco_llama2, {"text": "<s>[INST] Hi [/INST] Hello.\n </s>"}, "does not parse"),
    (guanaco_llama2, {"text": "<s>[INST] <<SYS>>\nBe kind.\nHi [/INST] Hello. </s>"}, "does not parse"),
    (guanaco_llama2, {"text": "<s>[INST] <<SYS>> S <</SYS>> Hi [/INST] Hello. </s>"}, "does not parse"),
    (guanaco_llama2, {"text": "<s>[INST] Hi [/INST]"}, "ends without an answer"),
    (guanaco_llama2, {"text": LLAMA2 + "<s>[INST] Bye [/INST] "}, "ends without an answer"),
    (guanaco_llama2, {"text": "<s>[INST] Hi [/INST] </s>"}, "empty answer"),
    (guanaco_llama2, {"text": "<s>[INST]  [/INST] Hello. </s>"}, "empty question"),
    (
        guanaco_llama2,
        {"text": "<s>[INST] <<SYS>>\n\n<</SYS>>\n\nHi [/INST] Hello. </s>"},
        "empty system",
    ),
    (guanaco_llama2, {"text": "<s>[INST] Hi [/INST] a [INST] b [/INST] c </s>"}, "control string"),
    (guanaco_llama2, {"text": "<s>[INST] Hi [INST] you [/INST] Hello. </s>"}, "control string"),
    (guanaco_llama2, {"text": "<s>[INST] Hi <s> [/INST] Hello. </s>"}, "control string"),
    (guanaco_llama2, {"text": LLAMA2 + "<s>[INST] <<SYS>> [/INST] Hello. </s>"}, "control string"),
    # The text with ### Human:.
    (guanaco_text, {"text": ""}, "does not parse"),
    (guanaco_text, {"text": "Hello"}, "does not parse"),
    (guanaco_text, {"text": "Hello ### Human: a### Assistant: A"}, "does not parse"),
    (guanaco_text, {"text": "### Human: a"}, "no assistant turn"),
    (guanaco_text, {"text": "### Assistant: A"}, "roles out of order"),
    (guanaco_text, {"text": "### Human: a### Human: b### Assistant: B"}, "roles out of order"),
    (guanaco_text, {"text": "### Human: a### Assistant: A### Assistant: B"}, "roles out of order"),
    (guanaco_text, {"text": "### Human: a### Assistant: "}, "empty answer"),
    (guanaco_text, {"text": "### Human: ### Assistant: A"}, "empty question"),
    # Lists of turns.
    (sharegpt, {"conversations": "hello"}, "not messages"),
    (sharegpt, {"conversations": ["hello"]}, "not messages"),
    (sharegpt, {"conversations": [{"from": "human"}]}, "not messages"),
    (sharegpt, {"conversations": turns(("robot", "x"), keys=("from", "value"))}, "unknown role"),
    (sharegpt, {"conversations": turns((["human"], "x"), keys=("from", "value"))}, "unknown role"),
    (sharegpt, {"conversations": turns(("gpt", "x"), keys=("from", "value"))}, "roles out of order"),
    (messages, {"messages": []}, "no assistant turn"),
    (messages, {"messages": "hello"}, "not messages"),
    (messages, {"messages": {"role": "user", "content": "a"}}, "not messages"),
    (messages, {"messages": [{"role": "user"}]}, "not messages"),
    (messages, {"messages": [None]}, "not messages"),
    (messages, {"messages": turns(("robot", "x"))}, "unknown role"),
    (messages, {"messages": turns((None, "x"))}, "unknown role"),
    (messages, {"messages": turns((["user"], "x"))}, "unknown role"),
    (messages, {"messages": turns(("user", None))}, "not text"),
    (messages, {"messages": turns(("user", [{"type": "text", "text": "a"}]))}, "not text"),
    (messages, {"messages": turns(("system", "S"))}, "no assistant turn"),
    (messages, {"messages": turns(("system", "S"), ("user", "a"))}, "no assistant turn"),
    (messages, {"messages": turns(("assistant", "A"))}, "roles out of order"),
    (messages, {"messages": turns(("system", "S"), ("assistant", "A"))}, "roles out of order"),
    (messages, {"messages": turns(("user", "a"), ("user", "b"), ("assistant", "B"))}, "roles out of order"),
    (messages, {"messages": turns(("user", "a"), ("system", "S"), ("assistant", "A"))}, "roles out of order"),
    (
        messages,
        {"messages": turns(("user", "a"), ("assistant", "A"), ("user", "b"))},
        "ends without an answer",
    ),
    (messages, {"messages": turns(("system", ""), ("user", "a"), ("assistant", "A"))}, "empty system"),
    # Tools.
    (messages, {"messages": [*conversation("a"), RESULT, ANSWER]}, "tool result without a call"),
    (messages, {"messages": [*conversation("a", "A"), RESULT, ANSWER]}, "tool result without a call"),
    (
        messages,
        {"messages": [*conversation("a"), called(id="1"), {**RESULT, "tool_call_id": "2"}, ANSWER]},
        "tool result without a call",
    ),
    (messages, {"messages": [*conversation("a"), CALLED, ANSWER]}, "roles out of order"),
    (messages, {"messages": [*conversation("a"), CALLED, *conversation("b", "B")]}, "roles out of order"),
    (messages, {"messages": [*conversation("a"), CALLED, RESULT, *conversation("b", "B")]}, "roles out of order"),
    (messages, {"messages": [*conversation("a"), ANSWER, ANSWER]}, "roles out of order"),
    (messages, {"messages": [*conversation("a"), CALLED, RESULT]}, "ends without an answer"),
    (messages, {"messages": [*conversation("a"), called(arguments="{x: 1}")]}, "not a tool call"),
    (messages, {"messages": [*conversation("a"), called(arguments="[1]")]}, "not a tool call"),
    (messages, {"messages": [*conversation("a"), called(arguments={"x": b"1"})]}, "not a tool call"),
    (messages, {"messages": [*conversation("a"), called(arguments={"x": "\0"})]}, "unencodable text"),
    (messages, {"messages": [*conversation("a"), called(name="")]}, "not a tool call"),
    (messages, {"messages": [*conversation("a"), {**CALLED, "tool_calls": "f()"}]}, "not a tool call"),
    (sharegpt, {"conversations": [{"from": "function_call", "value": "f()"}]}, "not a tool call"),
    (messages, {"messages": conversation("a", "A"), "tools": "f()"}, "not tools"),
    (messages, {"messages": conversation("a", "A"), "tools": {"name": "f"}}, "not tools"),
    (messages, {"messages": conversation("a", "A"), "tools": [{"type": "function"}]}, "not tools"),
    # Weights.
    (messages, {"messages": [*conversation("a"), {**ANSWER, "weight": 0.5}]}, "not a weight"),
    (messages, {"messages": [*conversation("a"), {**ANSWER, "train": "no"}]}, "not a weight"),
    (messages, {"messages": [*conversation("a"), {**ANSWER, "weight": 1, "mask": True}]}, "not a weight"),
    (messages, {"messages": [{"role": "user", "content": "a", "weight": 1}, ANSWER]}, "not a weight"),
    (messages, {"messages": [*conversation("a"), {**ANSWER, "weight": 0}]}, "no turn in the loss"),
    # Prompts and completions.
    (prompt_completion, {"prompt": "a", "completion": conversation("a", "A")}, "not messages"),
    (prompt_completion, {"prompt": conversation("a", "A"), "completion": conversation("b")}, "no assistant turn"),
    # Pairs.
    (preferences, {"prompt": "a", "chosen": "A", "rejected": "A"}, "no two answers to one prompt"),
    # Plain text.
    (plain_text, {"text": " \n"}, "empty text"),
    (plain_text, {"text": ["a"]}, "not text"),
    (unmarked_text, {"text": "a [INST] b"}, "turn markers in a plain text"),
    (unmarked_text, {"text": "a\nUser: b"}, "turn markers in a plain text"),
    (messages, {"messages": [{"role": "text", "content": "a"}, *conversation("a", "A")]}, "roles out of order"),
]


@pytest.mark.parametrize(("formatter", "row", "reason"), BAD_ROWS)
def test_bad_row_is_refused_with_its_reason(formatter: Callable[..., list[Message]], row: object, reason: str) -> None:
    with pytest.raises(RowError) as error:
        formatter(row)
    assert error.value.reason == reason
    assert len(error.value.detail) < 500
    assert error.value.detail.isprintable()


def test_every_reason_has_a_row() -> None:
    """But for those that only a template can give; test_conversations.py has rows for them."""
    assert {reason for _, _, reason in BAD_ROWS} == REASONS - {Reason.LEFT_OUT, Reason.TEMPLATE}


def test_check_messages_names_its_source() -> None:
    with pytest.raises(RowError, match=r"^not messages: format_row gave None, expected a list of messages$"):
        check_messages(None)


def test_detect_names_the_formatter() -> None:
    for formatter, row, _ in GOOD_ROWS:
        assert detect(row) is formatter or formatter is plain_text  # which must be named


@pytest.mark.parametrize(
    ("row", "formatter"),
    [
        ({"instruction": "a", "output": "A", "text": "a A"}, alpaca),
        ({"messages": None, "question": "a", "answer": "A"}, question_answer),
        ({"prompt": "a", "messages": conversation("a", "A")}, messages),
        ({"text": "Once upon a time", "id": 3}, unmarked_text),
    ],
)
def test_detect_looks_at_the_columns_that_hold_something(
    row: dict[str, Any], formatter: Callable[..., list[Message]]
) -> None:
    assert detect(row) is formatter


@pytest.mark.parametrize("row", [{}, {"text": "[INST] a [/INST] A"}, {"text": ""}, {"text": 3}, {"question": "a"}])
def test_detect_lists_the_known_shapes(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as error:
        detect(row)
    assert all(name in str(error.value) for name in FORMATTERS)


def test_formatters_are_listed_under_their_names() -> None:
    assert all(formatter.__name__ == name for name, formatter in FORMATTERS.items())


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
fragments = st.sampled_from([*CONTROL_STRINGS, *SEPARATORS, " ", "\n", "a", "\u3000", "\0", "\ud800"])
any_text = st.one_of(st.text(), st.lists(fragments, max_size=12).map("".join))
near_misses = st.sampled_from(["<", "s>", "</", "/s>", "[", "INST]", "[/", "<<", "SYS>>", "#", "### ", " ", "\n", "a"])
words = (st.text(characters, min_size=1) | st.lists(near_misses, max_size=8).map("".join)).filter(
    lambda text: is_visible(text) and not any(control in text for control in (*CONTROL_STRINGS, *SEPARATORS))
)
conversations = st.builds(
    lambda pairs, system: conversation(*[part for pair in pairs for part in pair], system=system),
    st.lists(st.tuples(words, words), min_size=1, max_size=3),
    st.none() | words,
)
KEYS = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "weight", "thinking"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=8,
)
COLUMNS = [
    "prompt",
    "completion",
    "tools",
    "text",
    "question",
    "answer",
    "instruction",
    "input",
    "output",
    "conversations",
    "messages",
]


def messages_or_reason(formatter: Callable[..., list[Message]], row: object) -> list[Message] | None:
    """Return what a formatter makes of a row, None where it refuses; anything else fails the test."""
    try:
        formatted = formatter(row)
    except RowError as error:
        assert error.reason in REASONS
        str(error).encode()
        return None
    said, tools = check_conversation(formatted)
    assert check_conversation({"messages": said, "tools": tools}) == (said, tools)
    return said


@quick
@given(conversations)
def test_llama2_text_is_read_back(conversation: list[Message]) -> None:
    text = render_llama2(conversation)
    assert guanaco_llama2({"text": text}) == check_messages(conversation)


@quick
@given(any_text | st.lists(any_text, min_size=2, max_size=4))
def test_llama2_text_that_is_accepted_is_rendered_the_same(parts: str | list[str]) -> None:
    text = parts if isinstance(parts, str) else render_llama2(conversation(*parts[: len(parts) // 2 * 2]))
    formatted = messages_or_reason(guanaco_llama2, {"text": text})
    assert formatted is None or render_llama2(formatted) == text


@quick
@given(conversations)
def test_guanaco_text_is_read_back(conversation: list[Message]) -> None:
    turns = [turn for turn in check_messages(conversation) if turn["role"] != "system"]
    separators = {"user": SEPARATORS[0], "assistant": SEPARATORS[1]}
    text = "".join(f"{separators[turn['role']]} {turn['content']}" for turn in turns)
    assert guanaco_text({"text": text}) == turns


@quick
@given(st.dictionaries(st.sampled_from(COLUMNS), json_values) | json_values)
def test_any_row_gives_messages_or_a_reason(row: object) -> None:
    for formatter in FORMATTERS.values():
        messages_or_reason(formatter, row)


@quick
@given(any_text, any_text)
def test_any_text_gives_messages_or_a_reason(first: str, second: str) -> None:
    row = dict.fromkeys(COLUMNS, first) | {"answer": second, "output": second}
    row["messages"] = conversation(first, second)
    row["conversations"] = turns(("human", first), ("gpt", second), keys=("from", "value"))
    for formatter in FORMATTERS.values():
        messages_or_reason(formatter, row)


@quick
@given(json_values)
def test_check_messages_gives_messages_or_a_reason(value: object) -> None:
    messages_or_reason(check_messages, value)
