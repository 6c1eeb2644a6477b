"""Rows to token ids: what is counted, dropped, cut and held out."""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.data import prepare as data_module
from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.data.conversations import Row
from qlora_recipes.data.encoded import IGNORED, EncodedBatch
from qlora_recipes.data.encoding import ConversationEncoder, Rendered
from qlora_recipes.data.prepare import PreparedData, prepare
from qlora_recipes.errors import DataError, SetupError
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.recipe import load_recipe
from qlora_recipes.settings import STANDIN, resolve

RECIPES = Path(__file__).parent.parent / "recipes"
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
    assert len(run(rows(5), dataset=file_free).held_out) == 0


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


def test_the_bundled_rows_are_what_they_were_before_they_lay_on_disk(encoder: ConversationEncoder) -> None:
    """Figures of the release that held every row in memory."""
    settings = resolve(load_recipe(str(RECIPES / "llama2_guanaco.py")), demo=True, training=dict(max_length=40))
    data = prepare(settings, encoder)
    receipt = data.receipt
    assert receipt.fingerprint == "526cf3485df1285c9d1d8695d3376872a0254f51d5fbbbfa0c2101bdf64f1af4"
    assert (receipt.rows_in, receipt.rows_used, receipt.rows_held_out, receipt.rows_dropped) == (1200, 1136, 64, {})
    assert (receipt.tokens, receipt.supervised_tokens, receipt.supervised_tokens_lost) == (37941, 9445, 5243)
    assert receipt.rows_truncated == receipt.answers_truncated == 469
    assert data.template.bos_per_row == [1, 2] and data.template.end_token_trained
    digest = hashlib.sha256()
    for row in (*data.train, *data.held_out):
        ids, labels = row.encoded.input_ids, row.encoded.labels
        kept = [row.place, row.messages, ids, labels, row.supervised_lost, row.truncated]
        digest.update(json.dumps(kept).encode())
    assert digest.hexdigest() == "e08fae64f98521f16585a51d50c7e6c19e40cc121db9ae65852fc98b55ef55d4"


def test_rows_are_taken_from_the_file_a_few_at_a_time(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a batch is tokenized, only the few after it have been read, and next to nothing of earlier ones is held."""
    read, tokenized, alive, batches, ahead = 0, 0, [], [], []
    plain = ConversationEncoder.tokenize

    def format_row(row: dict[str, str]) -> list[dict[str, str]]:
        nonlocal read
        read += 1
        return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]

    def tokenize(self: ConversationEncoder, conversations: Sequence[Rendered]) -> EncodedBatch:
        nonlocal tokenized
        batches.append(sum("Question" in rendered.text for rendered in conversations))  # and not what figures need once
        tokenized += batches[-1]
        ahead.append(read - tokenized)
        gc.collect()
        alive.append(sum(type(held) in (Conversation, Row) for held in gc.get_objects()))
        return plain(self, conversations)

    monkeypatch.setattr(data_module, "_BATCH", 400)
    monkeypatch.setattr(ConversationEncoder, "tokenize", tokenize)
    gc.freeze()  # what was there before is not counted, which would take seconds
    try:
        assert len(run(rows(200), format_row=staticmethod(format_row)).train) == 150
    finally:
        gc.unfreeze()
    assert len(alive) > 10
    assert max(ahead) <= (data_module._AHEAD + 1) * max(batches)
    assert max(alive) <= (data_module._AHEAD + 2) * max(batches)  # of 200: those batches, and the one before


def test_the_dataset_lies_on_disk_and_holds_the_training_rows(run: Prepare) -> None:
    data = run(rows(40))
    dataset = data.train.dataset()
    assert dataset["input_ids"][:] == [row.encoded.input_ids for row in data.train]
    assert dataset["labels"][:] == [row.encoded.labels for row in data.train]
    assert dataset.cache_files


def test_figures_stand_for_the_rows_of_their_side(run: Prepare) -> None:
    data = run([*rows(30), {"question": "long", "answer": "word " * 200}], max_length=64)
    for side, figures in ((data.train, data.figures), (data.held_out, data.held_out_figures)):
        assert figures["length"].tolist() == [len(row.encoded.input_ids) for row in side]
        assert figures["truncated"].tolist() == [row.truncated for row in side]
        assert figures["supervised"].tolist() == [row.encoded.supervised for row in side]


def test_batches_change_nothing(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [*rows(30), {"question": "x [/INST]", "answer": "a"}, {"question": "long " * 300, "answer": "a"}, *rows(9)]
    whole = run(mixed)
    monkeypatch.setattr(data_module, "_BATCH", 1)
    one_by_one = run(mixed)
    assert one_by_one.receipt == whole.receipt
    assert list(one_by_one.train) == list(whole.train)
    assert list(one_by_one.held_out) == list(whole.held_out)


def test_a_row_that_raises_leaves_no_file(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def format_row(row: dict[str, str]) -> list[dict[str, str]]:
        return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(data_module, "_BATCH", 1)
    with pytest.raises(DataError, match="line 9: format_row failed"):
        run([*rows(8), {"question": "no answer"}], format_row=staticmethod(format_row))
    assert list(folder.iterdir()) == []


def test_no_room_for_the_rows_is_one_error(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(SetupError, match="prepared rows cannot be written"):
        run(rows(4))
