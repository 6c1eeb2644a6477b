"""Prepared rows are on disk: read back as they were, a few at a time, and removed when nothing refers to them."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_recipes.data.arrow_rows import Conversation, Rows, write_rows
from qlora_recipes.data.encoding import Encoded
from qlora_recipes.errors import DataError, SetupError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that temporary files are put into."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def conversation(number: int) -> Conversation:
    return Conversation(
        place=f"line {number}",
        messages=[{"role": "user", "content": f"Où? {number}"}, {"role": "assistant", "content": '瑞典 "😊"\n'}],
        encoded=Encoded([1, *range(number)], [-100, *range(number)]),
        supervised_lost=number % 3,
        truncated=number % 3 > 0,
    )


ALL = [conversation(number) for number in range(20)]
BATCHES = [ALL[:7], [], ALL[7:8], ALL[8:]]


def test_rows_read_back_as_they_were_written() -> None:
    rows = write_rows(BATCHES)
    assert len(rows) == len(ALL)
    assert list(rows) == list(rows) == ALL
    assert [rows[i] for i in range(-20, 20)] == ALL + ALL
    assert list(rows[3:12:2]) == ALL[3:12:2]
    assert list(rows[::-1]) == ALL[::-1]
    assert list(rows[:0]) == []
    with pytest.raises(IndexError):
        rows[20]


def test_chosen_rows_keep_their_order_and_number_from_zero() -> None:
    import numpy

    rows = write_rows(BATCHES)
    odd = rows.where(numpy.arange(20) % 2 == 1)
    assert list(odd) == ALL[1::2]
    assert odd[4] == ALL[9]


def test_the_dataset_is_read_from_the_file_and_not_copied(folder: Path) -> None:
    rows = write_rows(BATCHES)[2:18:3]
    dataset = rows.dataset()
    assert dataset.column_names == ["input_ids", "labels"]
    assert dataset["input_ids"][:] == [row.encoded.input_ids for row in rows]
    assert dataset["labels"][:] == [row.encoded.labels for row in rows]
    assert dataset.features["input_ids"].feature.dtype == "int32"
    assert [Path(file["filename"]).parent.parent for file in dataset.cache_files] == [folder]


def test_rows_are_written_before_the_next_are_asked_for(folder: Path) -> None:
    sizes = []

    def batches() -> Iterator[list[Conversation]]:
        for _ in range(4):
            yield ALL
            sizes.append(next(folder.rglob("rows.arrow")).stat().st_size)

    write_rows(batches())
    assert sizes == sorted(set(sizes))


def test_the_folder_goes_with_the_last_of_its_rows(folder: Path) -> None:
    rows = write_rows(BATCHES)
    some = rows[:3]
    del rows
    gc.collect()
    assert list(some) == ALL[:3]
    del some
    gc.collect()
    assert list(folder.iterdir()) == []


def test_the_folder_goes_when_the_process_ends(folder: Path) -> None:
    code = (
        "from qlora_recipes.data.arrow_rows import write_rows\n"
        "rows = write_rows([])\n"
        "import os; print(len(os.listdir(os.environ['TMPDIR'])))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env={"TMPDIR": str(folder)}, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "1"
    assert list(folder.iterdir()) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # what is tested is a fork
def test_a_forked_worker_leaves_the_folder(folder: Path) -> None:
    rows: list[Rows] = [write_rows(BATCHES)]
    worker = multiprocessing.get_context("fork").Process(target=rows.clear)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert list(rows[0]) == ALL


def test_what_is_raised_while_writing_leaves_nothing(folder: Path) -> None:
    def batches() -> Iterator[list[Conversation]]:
        yield ALL
        raise DataError("line 21 is broken")

    with pytest.raises(DataError, match="line 21"):
        write_rows(batches())
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_one_error_that_says_where(folder: Path) -> None:
    """The system refuses to write files beyond 20 kB, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SetupError) as caught:
            write_rows([ALL] * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "GiB are free" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "TMPDIR=" in str(caught.value)
    assert list(folder.iterdir()) == []


def test_no_folder_for_temporary_files_is_the_same_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    with pytest.raises(SetupError, match=r"No such file or directory.*TMPDIR="):
        write_rows([ALL])


def test_messages_are_stored_as_the_fingerprint_reads_them(folder: Path) -> None:
    rows = write_rows(BATCHES)
    read = next(iter(rows))
    assert json.dumps(read.messages) == json.dumps(ALL[0].messages)
    assert list(rows[3:].words_as_json()) == [json.dumps(row.messages, ensure_ascii=False) for row in ALL[3:]]


def test_what_a_killed_process_left_is_removed_by_the_next(folder: Path) -> None:
    """Not what a running one holds, what was just made, or a folder that holds anything else."""
    abandoned, other, young = (folder / f"qlora-recipes-rows-{name}" for name in ("abandoned", "other", "young"))
    for path in (abandoned, other, young):
        path.mkdir()
        (path / "rows.arrow").write_bytes(b"rows")
    (other / "thesis.txt").write_text("mine")
    for name in ("cache-0123.arrow", "tmp0123"):  # of datasets
        (abandoned / name).write_bytes(b"rows")
    held = write_rows(BATCHES)
    for path in folder.iterdir():
        if path != young:
            os.utime(path, (0, 0))
    rows = write_rows(BATCHES)
    assert list(held) == list(rows) == ALL
    assert not abandoned.exists()
    assert (other / "thesis.txt").exists() and (young / "rows.arrow").exists()
