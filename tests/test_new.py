"""`qlora-recipes new`: a recipe from the columns of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_recipes import cli, load_recipe
from qlora_recipes.formatters import FORMATTERS, preferences
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT, ModelSpec

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
TEXT = {
    "guanaco_llama2": "<s>[INST] Why? [/INST] Because. </s>",
    "guanaco_text": "### Human: Why?### Assistant: Because.",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(name: str, *rows: dict[str, Any], file: str = "rows.jsonl", model: str = "LLAMA_2_7B_CHAT") -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cli.main(["new", name, "--model", model, "--dataset", file])


@pytest.mark.parametrize(
    ("row", "formatter"),
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, "sharegpt"),
        ({"instruction": "Why?", "input": "", "output": "Because."}, "alpaca"),
        ({"Question": "Why?", "answer ": "Because."}, "question_answer"),
        *(({"text": text}, name) for name, text in TEXT.items()),
        ({"prompt": "Why?", "completion": "Because."}, "prompt_completion"),
        ({"Prompt": "Why?", "Response": "Because.", "id": "7", "source": "web"}, None),
        ({"subject": "Why?", "body": "Because."}, None),
    ],
)
def test_columns_that_are_known(row: dict[str, Any], formatter: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    new("mine", row, row, {**row, next(iter(row)): ""})
    recipe = load_recipe("mine.py")
    assert recipe.model is LLAMA_2_7B_CHAT
    assert recipe.dataset.source == "rows.jsonl"
    assert recipe.dataset.format_row is FORMATTERS.get(formatter or "")
    assert recipe.formatter()(row) == TURNS
    lines = Path("mine.py").read_text().splitlines()
    assert len([line for line in lines if line]) <= 11
    assert "2 of its first 3 rows can be used; the first of the others: " in capsys.readouterr().out


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "../a 'model'", 'of """mine'])
def test_any_model_can_be_named(model: str) -> None:
    new("mine", {"question": "Why?", "answer": "Because."}, model=model)
    assert load_recipe("mine.py").model == ModelSpec(model)


def test_rows_with_tools_can_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    new("mine", {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]})
    assert "1 of its first 1 rows can be used\n" in capsys.readouterr().out


def test_two_answers_are_preferences(capsys: pytest.CaptureFixture[str]) -> None:
    new("mine", {"prompt": "Why?", "Chosen": "Because.", "rejected": "No."})
    recipe = load_recipe("mine.py")
    assert recipe.method == "dpo" and recipe.dataset.format_row is preferences
    assert "1 of its first 1 rows can be used\n" in capsys.readouterr().out


def test_what_cannot_be_guessed_is_left_to_fill_in(capsys: pytest.CaptureFixture[str]) -> None:
    new("mine", {"title": "a", "body": "b", "comment": "c", "id": "1"}, model=FALCON_7B.hub_id)
    said = capsys.readouterr().out
    assert "in place of QUESTION and ANSWER; it has 'title', 'body', 'comment'" in said
    filled = Path("mine.py").read_text().replace("QUESTION", "title").replace("ANSWER", "body")
    Path("mine.py").write_text(filled)
    recipe = load_recipe("mine.py")
    assert recipe.model is FALCON_7B
    assert [turn["content"] for turn in recipe.formatter()({"title": "a", "body": "b"})] == ["a", "b"]


@pytest.mark.parametrize("name", ["recipe", "none", "dataset_spec", "my_own_data"])
@pytest.mark.parametrize("key", ["a b", "it's", 'say "it"', "a\\b", "é\n", "'\""])
def test_any_name_and_column_is_python(name: str, key: str) -> None:
    new(name, {key: "Why?", "reply": "Because."}, file="my 'data'.jsonl")
    recipe = load_recipe(f"{name}.py")
    assert recipe.dataset.source == "my 'data'.jsonl"
    assert recipe.formatter()({key: "Why?", "reply": "Because."}) == TURNS


ROW = '{"question": "a", "answer": "b"}'
REFUSED: dict[str, tuple[Sequence[str], str, str]] = {
    "no name": ([], ROW, "NAME is missing"),
    "a path": (["a/b"], ROW, "NAME: got 'a/b', expected letters"),
    "a taken name": (["taken.py"], ROW, "taken.py exists, and is left as it is"),
    "a module": (["datasets"], ROW, "would hide the Python module datasets"),
    "no model": (
        ["mine", "--dataset", "rows.jsonl"],
        ROW,
        "--model is missing; expected a hub id or a folder, such as Qwen/Qwen3-8B",
    ),
    "an empty model": (["mine", "--model", " ", "--dataset", "rows.jsonl"], ROW, "--model: got ' ', expected text"),
    "no file": (["mine", "--model", "FALCON_7B"], ROW, "--dataset is missing"),
    "a missing file": (["mine", "--dataset", "x.csv"], ROW, "--dataset: got 'x.csv', expected a file that exists"),
    "no rows": (["mine"], "", "rows.jsonl has no rows"),
    "no objects": (["mine"], "1\n2\n", "has no text in its first"),
    "no words": (["mine"], '{"a": 1}\n', "has no text in its first 1 rows"),
    "broken JSON": (["mine"], "{\n", "broken JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_writes_nothing(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, content, message = REFUSED[case]
    Path("rows.jsonl").write_text(content)
    Path("taken.py").write_text("kept")
    flags = [] if any("--" in word for word in words) else ["--model", "FALCON_7B", "--dataset", "rows.jsonl"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["new", *words, *flags])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said and said.count("\n") == 1
    assert sorted(file.name for file in here.iterdir()) == ["rows.jsonl", "taken.py"]
    assert Path("taken.py").read_text() == "kept"
