"""`qlora-recipes new NAME --model MODEL --dataset FILE`: write a recipe for a file, after a look at its columns.

Loads no model.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_recipes.commands.flags import Parser, file_to_read
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError, UsageError
from qlora_recipes.fields import Field
from qlora_recipes.formatters import RowError, check_conversation, detect, folded
from qlora_recipes.models import MODELS
from qlora_recipes.recipe import load_recipe

_ABOUT = "Write a recipe for a data file into NAME.py, a program of about ten lines that can be trained as it is."
_NAMES = {**{name: name for name in MODELS}, **{spec.hub_id: name for name, spec in MODELS.items()}}
_FLAGS = (
    Field("model", "str", f"the model to tune: a hub id, a folder, {' or '.join(MODELS)}", "ID_OR_FOLDER", None),
    file_to_read("dataset", "your rows: a JSON, JSONL, CSV or Parquet file"),
)
_NAME = Field("name", "str", "the recipe's name, such as my_recipe", "NAME")
_ROWS = 100  # that are looked at
# Columns that no formatter of ours knows as a pair, but whose names leave no doubt.
_ASKS = ("prompt", "question", "instruction", "query", "input")
_ANSWERS = ("completion", "answer", "response", "output", "reply")


@dataclass(frozen=True)
class _Shape:
    """How a file's rows become messages."""

    says: str
    """What the user is told."""
    formatter: str = ""
    """Name of a formatter of ours; empty where the recipe has its own `format_row`."""
    asks: str = "QUESTION"
    answers: str = "ANSWER"
    columns: Sequence[str] = ()
    """Those to choose from, where you have to."""


def main(argv: Sequence[str]) -> None:
    """Write the recipe, and say how it reads the rows and what comes next.

    Raises:
        RecipesError: for a name, a model or a file that cannot be used; nothing is written then.
    """
    flags = Parser("qlora-recipes new", _ABOUT, {"flags": _FLAGS}, words=_NAME).parse(argv)
    file = _file(flags["name"].removesuffix(".py"))
    needed = {"model": "a hub id or a folder, such as Qwen/Qwen3-8B", "dataset": "a file that exists"}
    for name, expected in needed.items():
        if flags[name] is None:
            raise UsageError(f"--{name} is missing; expected {expected}")
    rows = [row for _, row in islice(read_rows(flags["dataset"]), _ROWS)]
    shape = _shape([row for row in rows if isinstance(row, Mapping)], flags["dataset"])
    with file.open("x", encoding="utf-8") as out:
        out.write(_source(file.stem, flags["model"], flags["dataset"], shape))
    print(f"wrote {file}: {shape.says}")
    if shape.columns:
        print(f"Then try it: qlora-recipes train {file} --demo")
    else:
        print(f"{_usable(file, rows)}\nTry it: qlora-recipes train {file} --demo")


def _file(name: str) -> Path:
    """Return the file to write, after refusing a name that cannot be one of a recipe."""
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
        raise UsageError(f"NAME: got {name!r}, expected letters, digits and _, such as my_recipe")
    file = Path(f"{name}.py")
    if file.exists() or file.is_symlink():
        raise UsageError(f"{file} exists, and is left as it is; give another name, or remove it first")
    found = importlib.util.find_spec(name)
    if found is not None and found.origin:
        raise UsageError(f"NAME: {file} would hide the Python module {name} from what runs here; give another name")
    return file


def _shape(rows: Sequence[Mapping[str, Any]], source: str) -> _Shape:
    """Return how rows become messages: by a formatter of ours, by two columns, or by what is to be filled in."""
    for row in rows:
        if {"chosen", "rejected"} <= {folded(name) for name in row}:
            return _Shape("its rows are read by the formatter preferences, and train with DPO.", "preferences")
        with suppress(DataError):
            formatter = detect(row).__name__
            return _Shape(f"its rows are read by the formatter {formatter}.", formatter)
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if _is_text(name, rows)]
    if not columns:
        raise DataError(f"{source} has no text in its first {len(rows)} rows; expected columns with words in them")
    asks, answers = ([c for c in columns if c.strip().lower() in names] for names in (_ASKS, _ANSWERS))
    if len(asks) == len(answers) == 1:
        return _Shape(f"{asks[0]!r} asks and {answers[0]!r} answers.", asks=asks[0], answers=answers[0])
    if len(columns) == 2:
        order = "taken in the order in which they stand; swap them in the file if that is wrong"
        return _Shape(f"{columns[0]!r} asks and {columns[1]!r} answers, {order}.", asks=columns[0], answers=columns[1])
    shown = ", ".join(map(repr, columns))
    says = f"say in format_row which column asks and which answers, in place of QUESTION and ANSWER; it has {shown}."
    return _Shape(says, columns=columns)


def _is_text(name: object, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column has words: numbers of a CSV file are strings too."""
    values = (row.get(name) for row in rows) if isinstance(name, str) else ()
    return any(isinstance(value, str) and any(map(str.isalpha, value)) for value in values)


def _source(name: str, model: str, dataset: str, shape: _Shape) -> str:
    """Return the text of the recipe's file."""
    known = _NAMES.get(model)  # one of ours is imported, any other named
    title = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    if title in ("Recipe", "DatasetSpec", known) or keyword.iskeyword(title):
        title = f"My{title}"
    base, data = (
        re.sub(r"[^\w. -]", "_", Path(each).name) for each in (MODELS[known].hub_id if known else model, dataset)
    )
    about = f'"""{base} on {data}."""'
    lines = [about, "", "from qlora_recipes import DatasetSpec, Recipe"]
    lines += [f"from qlora_recipes.formatters import {shape.formatter}"] if shape.formatter else []
    lines += [f"from qlora_recipes.models import {known}"] if known else []
    lines += ["", "", f"class {title}(Recipe):", f"    model = {known or _quoted(model)}"]
    formatter = f", format_row={shape.formatter}" if shape.formatter else ""
    lines += [f"    dataset = DatasetSpec({_quoted(dataset)}{formatter})"]
    lines += ['    method = "dpo"'] if shape.formatter == "preferences" else []
    if not shape.formatter:
        lines += [""] + [f"    # Columns: {', '.join(map(_quoted, shape.columns))}"] * bool(shape.columns)
        turns = {"user": shape.asks, "assistant": shape.answers}
        messages = (f'{{"role": "{role}", "content": row[{_quoted(column)}]}}' for role, column in turns.items())
        lines += ["    def format_row(self, row):", f"        return [{', '.join(messages)}]"]
    return "\n".join([*lines, "", "", 'if __name__ == "__main__":', f"    {title}.main()", ""])


def _quoted(text: str) -> str:
    """Return text as Python writes it, in double quotes where it holds none."""
    written = repr(text)
    return f'"{written[1:-1]}"' if written[0] == "'" and '"' not in written else written


def _usable(file: Path, rows: Sequence[Any]) -> str:
    """Read the written recipe, format the rows that were looked at, and say how many it can use."""
    formatter = load_recipe(file).formatter()
    assert formatter is not None
    faults = []
    for row in rows:
        try:
            check_conversation(formatter(row))
        except (RowError, KeyError, TypeError) as error:
            faults.append(str(error))
    said = f"{len(rows) - len(faults)} of its first {len(rows)} rows can be used"
    return f"{said}; the first of the others: {faults[0]}" if faults else said
