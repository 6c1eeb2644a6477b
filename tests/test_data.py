"""Rows to token ids: what is counted, dropped, cut and held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.data import PreparedData, prepare
from qlora_recipes.encoding import IGNORED, ConversationEncoder
from qlora_recipes.errors import DataError
from qlora_recipes.loading import load_tokenizer
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.settings import STANDIN, resolve

Prepare = Callable[..., PreparedData]


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    return ConversationEncoder(load_tokenizer(LLAMA_2_7B_CHAT, f"{STANDIN}llama2", None), LLAMA_2_7B_CHAT.chat_template)


@pytest.fixture
def run(tmp_path: Path, encoder: ConversationEncoder, recipe_for: Callable[..., type[Recipe]]) -> Prepare:
    def prepare_rows(rows: Sequence[Any], max_length: int = 128, seed: int = 0, **attributes: Any) -> PreparedData:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        attributes.setdefault("dataset", DatasetSpec(str(file), held_out=0.25))
        recipe = recipe_for(**attributes)
        settings = resolve(recipe, dataset=str(file), training=dict(max_length=max_length, seed=seed))
        return prepare(settings, encoder)

    return prepare_rows


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(start, start + count)]


def test_every_row_is_used_held_out_or_dropped_with_its_reason(run: Prepare) -> None:
    bad = [
        {"question": "q", "answer": ""},
        {"question": 3, "answer": "a"},
        {"question": "q"},
        "text",
        {"question": "x [/INST] y", "answer": "a"},
        {"question": "far too long " * 200, "answer": "a"},
    ]
    receipt = run([*rows(8), *bad]).receipt
    assert receipt.rows_in == 14
    assert receipt.rows_used + receipt.rows_held_out == 8
    assert receipt.rows_dropped == {
        "empty answer": 1,
        "not text": 1,
        "missing column": 1,
        "not an object": 1,
        "control string": 1,
        "no answer within max_length": 1,
    }


def test_tokens_are_counted_after_the_cut(run: Prepare) -> None:
    data = run([{"question": f"Q{i}", "answer": "word " * 60} for i in range(4)], max_length=64)
    receipt, train = data.receipt, data.train
    assert all(len(row.encoded.input_ids) == 64 for row in train)
    assert receipt.tokens == 64 * len(train)
    assert receipt.supervised_tokens == sum(sum(label != IGNORED for label in row.encoded.labels) for row in train)
    assert receipt.rows_truncated == receipt.answers_truncated == len(train)
    assert receipt.supervised_tokens_lost == sum(row.supervised_lost for row in train) > 0
    assert data.template.end_token_trained  # no whole row speaks against it


def test_the_split_depends_on_the_questions_alone(run: Prepare) -> None:
    def held_out(data: PreparedData) -> set[str]:
        return {row.messages[0]["content"] for row in data.held_out}

    first = run(rows(40))
    assert len(first.held_out) == 10
    assert held_out(first) == held_out(run(rows(40), seed=5)) == held_out(run(rows(40)[::-1]))


def test_rows_that_ask_the_same_stay_on_one_side(run: Prepare) -> None:
    data = run(rows(20) + rows(20) + [{"question": "Question 3?", "answer": "Another."}])
    asked = [{row.messages[0]["content"] for row in side} for side in (data.train, data.held_out)]
    assert not asked[0] & asked[1]


def test_nothing_is_held_out_when_the_recipe_says_so(run: Prepare) -> None:
    file_free = DatasetSpec("unused", held_out=0.0)
    assert run(rows(5), dataset=file_free).held_out == []


def test_the_fingerprint_follows_what_is_trained_on(run: Prepare) -> None:
    assert run(rows(8)).receipt.fingerprint == run(rows(8)).receipt.fingerprint
    assert run(rows(8)).receipt.fingerprint != run(rows(9)).receipt.fingerprint


def test_a_file_without_a_usable_row_shows_its_first_row(run: Prepare) -> None:
    with pytest.raises(DataError) as caught:
        run([{"question": "Why?", "answer": " "}] * 3)
    message = str(caught.value)
    assert "3 empty answer" in message
    assert '{"question": "Why?", "answer": " "}' in message
    assert "format_row" in message


def test_a_shape_that_nobody_knows_lists_those_known(run: Prepare) -> None:
    with pytest.raises(DataError) as caught:
        run([{"utterance": "x"}])
    assert "line 1" in str(caught.value)
    assert "question_answer: question, answer" in str(caught.value)


def test_a_failing_format_row_names_the_row(run: Prepare) -> None:
    def format_row(row):
        return [{"role": "user", "content": row["ask"]}]

    with pytest.raises(DataError, match=r"line 1: format_row failed with KeyError: 'ask'.*question, answer"):
        run(rows(2), format_row=staticmethod(format_row))


def test_a_format_row_without_an_answer_is_counted(run: Prepare) -> None:
    def format_row(row):
        return [{"role": "user", "content": row["question"]}]

    with pytest.raises(DataError, match="2 no assistant turn"):
        run(rows(2), format_row=staticmethod(format_row))
