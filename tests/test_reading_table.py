"""Data files of every kind: each gives the right conversations, or is refused with what is wrong and where."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.prepare import PreparedData, prepare
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.settings import STANDIN, resolve

Prepare = Callable[[Path], PreparedData]
Expected = tuple[str, ...] | list[list[str]] | dict[str, int]


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    return ConversationEncoder(load_tokenizer(LLAMA_2_7B_CHAT, f"{STANDIN}llama2", None), LLAMA_2_7B_CHAT.chat_template)


@pytest.fixture
def prepared(encoder: ConversationEncoder, recipe_for: Callable[..., type[Recipe]]) -> Prepare:
    def prepare_file(file: Path, **attributes: Any) -> PreparedData:
        recipe = recipe_for(dataset=DatasetSpec(str(file), held_out=0.0), **attributes)
        return prepare(resolve(recipe, dataset=str(file)), encoder)

    return prepare_file


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def said(*turns: tuple[str, object], **more: object) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role, content in turns]}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def parquet_of(names: list[str], *columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(list(map(pyarrow.array, columns)), names=names), sink)
    return sink.getvalue()


QA = {"question": "Why?", "answer": "So."}
ONE = [["Why?", "So."]]
HEADER = b"question,answer\n"
# A tuple holds parts of the message that refuses the file; a list, what its conversations say; a dict, what is dropped
# beside one good row.
CSV: dict[str, tuple[bytes, Expected]] = {
    "plain": (HEADER + b"Why?,So.\n", ONE),
    "no last line feed": (HEADER + b"Why?,So.", ONE),
    "carriage returns": (b"question,answer\r\nWhy?,So.\r\n", ONE),
    "carriage returns alone": (b"question,answer\rWhy?,So.\r", ONE),
    "byte order mark": (codecs.BOM_UTF8 + HEADER + b"Why?,So.\n", ONE),
    "columns in capitals and spaces": (b" Question ,ANSWER\nWhy?,So.\n", ONE),
    "blank lines": (b"\n" + HEADER + b"\n\nWhy?,So.\n\n", ONE),
    "a comma in quotes": (HEADER + b'Why?,"Red, mostly."\n', [["Why?", "Red, mostly."]]),
    "a line feed in quotes": (HEADER + b'Why?,"One.\nTwo."\n', [["Why?", "One.\nTwo."]]),
    "doubled quotes": (HEADER + b'Why?,"Say ""so""."\n', [["Why?", 'Say "so".']]),
    "a number": (HEADER + b"1+1?,2\n", [["1+1?", "2"]]),
    "a word that could be null": (HEADER + b"Why?,None\n", [["Why?", "None"]]),
    "a comma that is not quoted": (
        HEADER + b"Why?,So.\nWhat is item 1?,Item 1, which is red, is nice.\n",
        ("line 3: 4 cells, expected 2 (question, answer)", "in quotes"),
    ),
    "one cell fewer": (HEADER + b"Why?,So.\nWhy?\n", ("line 3: 1 cells, expected 2",)),
    "a cell too many after two lines in quotes": (
        HEADER + b'Why?,"One.\nTwo."\nWhy?,So,really\n',
        ("line 4: 3 cells",),
    ),
    "a comma at the end": (HEADER + b"Why?,So.,\n", ("line 2: 3 cells, expected 2",)),
    "a space before quotes": (HEADER + b'Why?, "Red, mostly."\n', ("line 2: 3 cells",)),
    "a line of spaces": (HEADER + b"Why?,So.\n  \n", ("line 3: 1 cells",)),
    "one column twice": (b"question,answer,answer\nWhy?,So.,No.\n", ("line 1", "'answer' and 'answer'")),
    "Answer beside answer": (b"question,Answer,answer \nWhy?,So.,No.\n", ("line 1", "'Answer' and 'answer '")),
    "semicolons": (b"question;answer\nWhy?;So.\n", ("line 1: the columns are separated by ';', expected commas",)),
    "tabs": (b"question\tanswer\nWhy?\tSo.\n", ("separated by '\\t', expected commas",)),
    "no header": (b"Why?,So.\nWho?,She.\n", ("line 2", "no formatter fits", "'Why?', 'So.'")),
    "a header alone": (HEADER, ("a.csv has no rows",)),
    "empty": (b"", ("a.csv has no rows",)),
    "blank": (b"\n\n\n", ("a.csv has no rows",)),
    "a quote that never ends": (HEADER + b'"Why?,So.\n', ("line 2: broken CSV",)),
    "a word after quotes": (HEADER + b'"Why"?,So.\n', ("line 2: broken CSV",)),
    "UTF-16": ("question,answer\nWhy?,So.\n".encode("utf-16"), ("line 1 is not UTF-8: byte 0 is 0xff; save it",)),
    "UTF-16 without a mark": ("question,answer\n".encode("utf-16-le"), ("line 1", r"'\x00', as UTF-16 does")),
    "Latin-1 far down": (HEADER + b"Why?,So.\n" * 2000 + b"Wo?,\xe9t\xe9\n", ("line 2002 is not UTF-8: byte 4 is",)),
    "NUL": (HEADER + b"Why?,So.\nWho?,S\0he\n", {"unencodable text": 1}),
    "an empty answer": (HEADER + b"Why?,So.\nWho?,\n", {"empty answer": 1}),
}
JSONL: dict[str, tuple[bytes, Expected]] = {
    "plain": (lines(QA), ONE),
    "byte order mark": (codecs.BOM_UTF8 + lines(QA), ONE),
    "carriage returns": (lines(QA) + b"\r\n" + lines({"question": "Who?", "answer": "I."}), [*ONE, ["Who?", "I."]]),
    "a line separator in a text": ('{"question": "a\u2028b", "answer": "c"}'.encode(), [["a\u2028b", "c"]]),
    "keys in another order": (lines({"answer": "So.", "question": "Why?"}), ONE),
    "a system turn": (lines(said(("system", "S"), ("user", "U"), ("assistant", "A"))), [["S", "U", "A"]]),
    "a joined emoji": (lines({**QA, "answer": "👩\u200d🚀"}), [["Why?", "👩\u200d🚀"]]),
    "a key twice": (
        b'{"question": "Why?", "answer": "So.", "answer": "No."}',
        ("line 1", "'answer'", "'No.'", "twice"),
    ),
    "a key twice inside": (
        lines(QA) + b'\n{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
        ("line 2", "the key 'role' is in one object twice"),
    ),
    "Answer beside answer": (lines(QA, {**QA, "Answer ": "No."}), ("line 2", "'answer' and 'Answer '")),
    "broken": (lines(QA) + b'\n{"question": \n', ("line 2, column", "broken JSON")),
    "two on a line": (lines(QA) + b"\n" + lines(QA) + b" " + lines(QA), ("line 2", "broken JSON, Extra data")),
    "single quotes": (b"{'question': 'Why?'}\n{}", ("line 1, column 2: broken JSON",)),
    "nested too deep": (lines(QA) + b"\n" + b'{"a":' * 100_000, ("line 2", "nested too deep")),
    "Latin-1 far down": (b"\n".join([lines(QA)] * 2000) + b'\n{"a": "\xe9"}', ("line 2001 is not UTF-8: byte 7 is",)),
    "no-break spaces": (lines(QA, {**QA, "answer": "\u00a0 \u00a0"}), {"empty answer": 1}),
    "spaces of zero width": (lines(QA, {**QA, "answer": "\u200b\u200d\ufeff\u2060"}), {"empty answer": 1}),
    "fillers": (lines(QA, {**QA, "answer": "\u3164 \u2800\ufe0f"}), {"empty answer": 1}),
    "a question of zero width": (lines(QA, {**QA, "question": "\u200b"}), {"empty question": 1}),
    "null": (lines(QA, {**QA, "answer": None}), {"missing column": 1}),
    "a number": (lines(QA, {**QA, "answer": 3}), {"not text": 1}),
    "NaN": (lines(QA, {**QA, "answer": float("nan")}), {"not text": 1}),
    "a list": (lines(QA, {**QA, "answer": ["So."]}), {"not text": 1}),
    "a number for a row": (lines(QA, 3), {"not an object": 1}),
    "null for a row": (lines(QA, None), {"not an object": 1}),
    "half a character": (lines(QA) + b"\n" + rb'{"question": "\ud800", "answer": "x"}', {"unencodable text": 1}),
    "a role marker": (lines(QA, {**QA, "answer": "a [/INST] b"}), {"control string": 1}),
    "a noncharacter": (lines(QA, {**QA, "answer": "\ufdd0"}), {"unencodable text": 1}),
}
MESSAGES: dict[str, tuple[Any, str]] = {
    "null": (None, "missing column"),
    "text": ("Why?", "not messages"),
    "an object": ({"role": "user"}, "not messages"),
    "none": ([], "no assistant turn"),
    "words": (["Why?"], "not messages"),
    "no content": ([{"role": "user"}], "not messages"),
    "no role": ([{"content": "Why?"}], "not messages"),
    "a role of another case": ([{"role": "User", "content": "Why?"}], "unknown role"),
    "a number for a role": ([{"role": 1, "content": "Why?"}], "unknown role"),
    "a list for a role": ([{"role": ["user"], "content": "Why?"}], "unknown role"),
    "null for content": ([{"role": "user", "content": None}], "not text"),
    "parts for content": ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "not text"),
    "tool": (said(("user", "U"), ("tool", "T"), ("assistant", "A"))["messages"], "tool result without a call"),
    "robot": (said(("user", "U"), ("robot", "T"), ("assistant", "A"))["messages"], "unknown role"),
    "assistant first": (said(("assistant", "A"), ("user", "U"), ("assistant", "A"))["messages"], "roles out of order"),
    "two questions": (said(("user", "U"), ("user", "U"), ("assistant", "A"))["messages"], "roles out of order"),
    "two answers": (said(("user", "U"), ("assistant", "A"), ("assistant", "A"))["messages"], "roles out of order"),
    "system alone": (said(("system", "S"))["messages"], "no assistant turn"),
    "system last": (said(("user", "U"), ("system", "S"), ("assistant", "A"))["messages"], "roles out of order"),
    "no answer": (said(("user", "U"))["messages"], "no assistant turn"),
    "question last": (said(("user", "U"), ("assistant", "A"), ("user", "U"))["messages"], "ends without an answer"),
}
JSON: dict[str, tuple[bytes, Expected]] = {
    "a list": (json.dumps([QA], indent=1).encode(), ONE),
    "a list on one line": (json.dumps([QA]).encode(), ONE),
    "under a key": (json.dumps({"version": "1", "data": [QA]}).encode(), ONE),
    "lines": (lines(QA, QA), ONE * 2),
    "a key twice": (b'[{"question": "Why?",\n"question": "Who?", "answer": "So."}]', ("'question'", "twice")),
    "the list twice": (b'{"data": [{"a": 1}], "data": []}', ("the key 'data' is in one object twice",)),
    "Answer beside answer": (json.dumps([QA, {"Answer": "No.", **QA}]).encode(), ("row 1", "'Answer' and 'answer'")),
    "an object": (json.dumps({"a": QA}).encode(), ("one object with the keys a",)),
    "lists of lists": (json.dumps([["Why?", "So."]]).encode(), ("1 not an object", "the first (row 0)")),
    "a comma at the end": (b'[\n{"question": "Why?", "answer": "So."},\n]', ("line 3, column 1: broken JSON",)),
    "UTF-32": (json.dumps([QA]).encode("utf-32"), ("is not UTF-8: byte 0",)),
}
PARQUET: dict[str, tuple[bytes, Expected]] = {
    "plain": (parquet([QA]), ONE),
    "messages": (parquet([said(("user", "Why?"), ("assistant", "So."))]), ONE),
    "a column of nulls": (parquet([{**QA, "other": None}]), ONE),
    "one column twice": (parquet_of(["question", "answer", "answer"], ["Why?"], ["So."], ["No."]), ("answer",)),
    "Answer beside answer": (
        parquet_of(["question", "Answer", "answer"], ["W"], ["S"], ["N"]),
        ("'Answer' and 'answer'",),
    ),
    "no rows": (parquet_of(["question", "answer"], [], []), ("a.parquet has no rows",)),
    "numbers": (parquet([{"question": "Why?", "answer": 3}]), ("1 not text", "answer is 3")),
    "bytes": (parquet([{"question": b"Why?", "answer": b"So."}]), ("1 not text", "b'Why?'")),
    "a null": (parquet([QA, {**QA, "answer": None}]), {"missing column": 1}),
    "cut": (parquet([QA])[:-9], ("a.parquet is not a Parquet file",)),
    "empty": (b"", ("a.parquet is not a Parquet file",)),
    "CSV": (HEADER + b"Why?,So.\n", ("a.parquet is not a Parquet file",)),
}
TABLE = {
    **{("a.csv", name): case for name, case in CSV.items()},
    **{("a.jsonl", name): case for name, case in JSONL.items()},
    **{("a.json", name): case for name, case in JSON.items()},
    **{("a.parquet", name): case for name, case in PARQUET.items()},
    **{
        ("a.jsonl", f"messages: {name}"): (
            lines(said(("user", "Why?"), ("assistant", "So.")), {"messages": bad}),
            {reason: 1},
        )
        for name, (bad, reason) in MESSAGES.items()
    },
}


@pytest.mark.parametrize("case", TABLE, ids=" ".join)
def test_a_file_is_read_as_it_was_meant_or_refused(prepared: Prepare, tmp_path: Path, case: tuple[str, str]) -> None:
    content, expected = TABLE[case]
    file = tmp_path / case[0]
    file.write_bytes(content)
    if isinstance(expected, tuple):
        with pytest.raises(DataError) as caught:
            prepared(file)
        assert all(part in str(caught.value) for part in (case[0], *expected)), caught.value
        return
    data = prepared(file)
    conversations = [[message["content"] for message in row.messages] for row in data.train]
    assert conversations == (ONE if isinstance(expected, dict) else expected)
    assert data.receipt.rows_dropped == (expected if isinstance(expected, dict) else {})
    assert data.receipt.columns_unread == {}


def test_the_table_has_a_hundred_cases() -> None:
    assert len(TABLE) >= 100


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a FIFO"),
        (os.mkdir, "a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows"])
def test_what_is_no_file_is_refused_with_what_it_is(
    tmp_path: Path, make: Callable[[Path], None], kind: str, name: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} is {kind}; expected a file that ends in"):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("source", ["https://example.com/rows.jsonl", "hf://datasets/a/b", "s3://bucket/rows.csv"])
def test_a_url_is_refused_as_one(source: str) -> None:
    with pytest.raises(DataError, match="is a URL; expected a hub id or a file"):
        read_rows(source)


@pytest.mark.parametrize("source", ["", ".", "a\0b", "a\0b.jsonl", "x" * 5000, "x" * 5000 + ".csv", "/nowhere/rows"])
def test_a_name_that_is_no_file_is_one_error(source: str) -> None:
    with pytest.raises(DataError):
        list(read_rows(source))


# ---- Columns that are not read ----


def test_columns_that_are_not_read_are_counted_where_they_are_filled(prepared: Prepare, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    more = {"context": "It rained.", "weight": 0, "images": [], "thinking": None, "id": ""}
    file.write_bytes(lines({**QA, **more}, {**QA, "context": "It snowed."}, {**QA, "answer": "", "source": "x"}))
    assert prepared(file).receipt.columns_unread == {"context": 2, "weight": 1}


def test_keys_of_message_objects_that_are_not_read_are_counted(prepared: Prepare, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [said(("user", "Why?"), ("assistant", "So."), function_call=[{"name": "f"}], name=None)]
    file.write_bytes(lines(*rows))
    assert prepared(file).receipt.columns_unread == {"messages[].function_call": 2}
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So.", "score": 0}]
    file.write_bytes(lines({"id": "1", "conversations": turns}))
    assert prepared(file).receipt.columns_unread == {"id": 1, "conversations[].score": 1}


@pytest.mark.parametrize(
    ("look", "unread"),
    [
        (lambda row: row["question"], {"answer", "context"}),
        (lambda row: row.get("context") or row.get("nothing"), {"question", "answer"}),
        (lambda row: dict(row)["question"], set()),
        (lambda row: {**row}["question"], set()),
        (lambda row: row.copy()["question"], set()),
        (lambda row: " ".join(row.values()), set()),
        (lambda row: " ".join(value for _, value in row.items()), set()),
        (lambda row: json.dumps(row), set()),
        (lambda row: row.pop("question"), {"answer", "context"}),
        (lambda row: row.pop("nothing", "x"), {"question", "answer", "context"}),
        (lambda row: " ".join(row), {"question", "answer", "context"}),
    ],
)
def test_a_format_row_of_your_own_is_watched(
    encoder: ConversationEncoder,
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    look: Callable[[dict[str, str]], str],
    unread: set[str],
) -> None:
    def format_row(row: dict[str, str]) -> list[dict[str, str]]:
        return [{"role": "user", "content": look(row)}, {"role": "assistant", "content": "So."}]

    file = tmp_path / "a.jsonl"
    file.write_bytes(lines({**QA, "context": "It rained."}))
    recipe = recipe_for(format_row=staticmethod(format_row))
    assert set(prepare(resolve(recipe, dataset=str(file)), encoder).receipt.columns_unread) == unread


# ---- The commit of a hub dataset ----


@pytest.mark.parametrize(
    ("folder", "commit"), [("0a" * 20, "0a" * 20), ("default-7b3f", None)], ids=["commit", "unknown"]
)
def test_the_commit_of_a_hub_dataset_is_recorded(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, commit: str | None
) -> None:
    import datasets

    (tmp_path / folder).mkdir()
    file = tmp_path / folder / "rows-train.arrow"
    with pyarrow.ipc.new_stream(file, (table := pyarrow.Table.from_pylist([QA])).schema) as stream:
        stream.write_table(table)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_file(str(file)))
    assert prepared(Path("somebody/rows")).receipt.revision == commit


# ---- Whatever else a file can hold ----

cells = st.text(alphabet='a,;"\n\r\0\u200b é', max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=True) | cells,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "Role"]), inner, max_size=3)
    ),
    max_leaves=6,
)
columns = st.sampled_from(["question", "answer", "Answer ", "messages", "conversations", "text", "instruction", "x"])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(columns, values, max_size=4) | values, max_size=4), name=st.sampled_from("abc"))
@example(rows=[{"messages": [{"role": ["user"], "content": "a"}]}], name="a")
@example(rows=[{"conversations": [{"from": {}, "value": "a"}]}], name="b")
def test_any_json_is_rows_or_one_error(prepared: Prepare, tmp_path: Path, rows: list[Any], name: str) -> None:
    file = tmp_path / {"a": "a.jsonl", "b": "a.json", "c": "lines.json"}[name]
    file.write_text(json.dumps(rows) if name == "b" else "\n".join(map(json.dumps, rows)))
    _check(prepared, file, len(rows))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
def test_any_cells_come_back_from_csv(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("question", "answer"), *rows])
    assert [tuple(row.values()) for _, row in read_rows(str(tmp_path / "a.csv"))] == rows


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.sampled_from(["question,answer", "question,answer,context", " Question,answer ", '"question",answer']),
    rest=st.lists(st.lists(cells, max_size=4).map(",".join), max_size=4).map("\n".join),
)
def test_any_csv_is_rows_or_one_error(prepared: Prepare, tmp_path: Path, header: str, rest: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"{header}\n{rest}", newline="")
    _check(prepared, file)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.dictionaries(columns, values, min_size=1, max_size=4), copies=st.integers(0, 3))
def test_any_parquet_is_rows_or_one_error(prepared: Prepare, tmp_path: Path, row: dict[str, Any], copies: int) -> None:
    try:
        content = parquet([row] * copies)
    except pyarrow.ArrowException:  # no such file can be
        return
    (tmp_path / "a.parquet").write_bytes(content)
    _check(prepared, tmp_path / "a.parquet", copies)


def _check(prepared: Prepare, file: Path, count: int | None = None) -> None:
    try:
        data = prepared(file)
    except DataError as error:
        assert file.name in str(error)
        str(error).encode("utf-8", "backslashreplace")
        return
    receipt = data.receipt
    assert receipt.rows_used + sum(receipt.rows_dropped.values()) == receipt.rows_in == (count or receipt.rows_in)
    for row in data.train:
        assert row.messages[-1]["role"] in ("assistant", "text") and row.messages[-1]["content"].strip()
