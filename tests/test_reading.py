"""Files of every kind give the same rows, and a broken one is named with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError

ROWS = [{"question": "Où?", "answer": "Ici, là"}, {"question": "a\nb", "answer": 'say "x"'}]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [row for _, row in read_rows(str(write(tmp_path / name, ROWS)))] == ROWS


def test_rows_may_stand_under_a_key_after_a_byte_order_mark_or_one_a_line(tmp_path: Path) -> None:
    under_key, marked, lines = (tmp_path / name for name in ("key.json", "bom.json", "lines.json"))
    under_key.write_text(json.dumps({"version": 1, "questions": ROWS}))
    marked.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    for file in (under_key, marked, lines):
        assert [row for _, row in read_rows(str(file))] == ROWS, file


def test_places_say_where_a_row_stands(tmp_path: Path) -> None:
    assert [place for place, _ in read_rows(str(write(tmp_path / "a.jsonl", ROWS)))] == ["line 1", "line 2"]
    assert [place for place, _ in read_rows(str(write(tmp_path / "a.json", ROWS)))] == ["row 0", "row 1"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a" 2}\n', "line 2, column 6: broken JSON"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "line 2, column 6: broken JSON"),
        ("a.json", b"", "line 1, column 1: broken JSON"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b"3", "holds int; expected a list of rows"),
        ("a.json", b'{"a": 1}', "one object with the keys a"),
        ("a.json", b'{"a": [], "b": []}', "lists under a, b"),
        ("a.jsonl", '{"a": "é"}'.encode("latin-1"), "is not UTF-8: byte 7 is 0xe9"),
        ("a.json", '[{"a": "é"}]'.encode("latin-1"), "is not UTF-8: byte 8 is 0xe9"),
        ("a.csv", b'a,b\n"x,1\n', "broken CSV"),
        ("a.csv", b"a,b\n", "has no rows"),
        ("a.parquet", b"PAR1", "is not a Parquet file"),
        ("a.txt", b"hello", "is not a data file; expected one that ends in .json, .jsonl, .csv, .parquet"),
    ],
)
def test_a_broken_file_is_one_error_that_says_where(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(file)))
    assert part in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"Did you mean 'rows\.jsonl'"):
        read_rows(str(tmp_path / "row.jsonl"))


def test_a_dataset_that_the_hub_cannot_give_is_one_error() -> None:
    with pytest.raises(DataError, match="no dataset 'nobody/nothing'"):
        list(read_rows("nobody/nothing"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_rows_are_read_as_they_are_asked_for(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file ten times as long takes no more memory for its first row; JSON is written as lines here."""
    import tracemalloc

    many = [{"question": f"Who is {i}?", "answer": "word " * 100} for i in range(2000)]
    peaks = []
    for rows in (many[:200], many):
        file = write(tmp_path / name.replace(".json", ".jsonl").replace("jsonll", "jsonl"), rows)
        file = file.rename(tmp_path / name)
        next(read_rows(str(file)))
        tracemalloc.start()
        next(read_rows(str(file)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0]


def test_two_documents_that_are_not_lines_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content in ('{"a": 1} {"a": 2}', '{"a":\n1}\n{"a": 2}'):
        file.write_text(content)
        with pytest.raises(DataError, match="broken JSON"):
            list(read_rows(str(file)))
