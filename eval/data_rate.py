"""Measure how fast rows are prepared, and that memory does not grow with their number.

python eval/data_rate.py --count 1000000 --rows guanaco_llama2.jsonl --tokenizer path/to/tokenizer --json rate.json

Conversations are made by repeating the rows of a file, each copy with its own number in its first question, and
prepared by the same `prepare` as those of a run. Everything temporary is removed at the end. Memory is the process's
anonymous memory (RssAnon), without the pages of memory-mapped files, which the system can reclaim. Without /proc it is
the peak of all its memory.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.flags import Parser, count, file_to_read, file_to_write
from qlora_recipes.data.reading import read_rows
from qlora_recipes.fields import Field
from qlora_recipes.formatters import Formatted, detect
from qlora_recipes.recipe import DatasetSpec, Recipe, load_recipe
from qlora_recipes.settings import STANDIN, resolve
from qlora_recipes.standins import ROWS

_RECIPE = Path(__file__).parent.parent / "recipes" / "llama2_guanaco.py"
_STATUS = Path("/proc/self/status")
_EVERY = 0.02  # seconds between two readings of memory
_FLAGS = (
    Field("recipe", "str", "whose model and formatter (default: Llama-2, Guanaco)", "FILE.py", str(_RECIPE)),
    file_to_read("rows", "a file in the recipe's shape (the bundled rows)"),
    Field("tokenizer", "str", "folder or hub id; the stand-in's by default", "FOLDER", None),
    count("count", "conversations to make (20,000)", 20_000),
    file_to_write("json", "write the figures here", ".json"),
)


@dataclass(frozen=True)
class Mark:
    """How far the work was at one moment."""

    what: str
    rows: int
    seconds: float
    """Since the first row was asked for."""
    peak_bytes: int
    """Peak memory since the previous mark."""


class Meter:
    """Watches memory from its own thread and makes a mark at every tenth of the rows."""

    def __init__(self, count: int) -> None:
        self.marks: list[Mark] = []
        self.rows = 0
        self._tenth = max(1, count // 10)
        self._began = time.monotonic()
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def row(self) -> None:
        """Count another row that was read."""
        self.rows += 1
        if self.rows % self._tenth == 0:
            self.mark("read and encoded")

    def mark(self, what: str) -> None:
        """Record how far the work is, and start a new peak."""
        self.marks.append(Mark(what, self.rows, time.monotonic() - self._began, max(self._peak, _held())))
        self._peak = 0

    def _look(self) -> None:
        while not self._ended.wait(_EVERY):
            self._peak = max(self._peak, _held())


def _held() -> int:
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_copies(rows: Path, count: int, file: Path) -> None:
    """Write `count` rows as JSON lines: those of a file over and over, each with its number."""
    kept = [row for _, row in read_rows(str(rows))]
    with file.open("w", encoding="utf-8") as out:
        for number, row in enumerate(islice(cycle(kept), count)):
            out.write(json.dumps({"number": number, "row": row}, ensure_ascii=False) + "\n")


def measured(recipe: type[Recipe], rows: Path, meter: Meter) -> type[Recipe]:
    """Return the recipe over such copies: its own formatter, then the number, with every row counted."""
    formatter = recipe.formatter() or detect(next(read_rows(str(rows)))[1])

    class Counted(Recipe):
        model = recipe.model
        dataset = DatasetSpec(str(rows), held_out=recipe.datasets()[0].held_out)
        training = recipe.training

        def format_row(self, row: Mapping[str, Any]) -> Formatted:
            meter.row()
            found = formatter(row["row"])
            messages = found["messages"] if isinstance(found, dict) else found
            first = next((message for message in messages if message["role"] == "user"), messages[0])
            first["content"] = f"({row['number']}) {first['content']}"
            return found

    return Counted


def measure(recipe: type[Recipe], rows: Path, tokenizer: str, count: int, folder: Path) -> dict[str, Any]:
    """Prepare and check `count` rows; return the marks, the receipt and the sizes of the files."""
    from qlora_recipes.base.tokenizer import load_tokenizer
    from qlora_recipes.data.encoding import ConversationEncoder
    from qlora_recipes.data.prepare import prepare
    from qlora_recipes.preflight import BEFORE_LOADING, run_checks
    from qlora_recipes.stages import Prepared, Run

    copies = folder / "copies.jsonl"
    write_copies(rows, count, copies)
    loaded = load_tokenizer(recipe.model, tokenizer, None)
    encoder = ConversationEncoder(loaded, loaded.template)
    with Meter(count) as meter:
        settings = resolve(measured(recipe, rows, meter), model=tokenizer, dataset=str(copies))
        data = prepare(settings, encoder)
        meter.mark("split and counted")
        run_checks(BEFORE_LOADING, Run(Prepared(settings, loaded, encoder, data)))
        meter.mark("checked")
    return {
        "marks": [asdict(mark) for mark in meter.marks],
        "receipt": asdict(data.receipt),
        "copies_bytes": copies.stat().st_size,
        "prepared_bytes": sum(Path(file["filename"]).stat().st_size for file in data.train.dataset().cache_files),
    }


def print_rates(found: Mapping[str, Any], console: Console) -> None:
    """Print one line per mark: rows and tokens per second since the previous mark, and the peak memory in between."""
    receipt = found["receipt"]
    tokens_a_row = receipt["tokens"] / receipt["rows_used"]
    table = Table(box=None, title="Preparing rows", title_justify="left")
    for name in ("rows", "", "seconds", "rows/s", "tokens/s", "peak MiB"):
        table.add_column(name, justify="left" if not name else "right")
    rows, seconds = 0, 0.0
    for mark in found["marks"]:
        rate = (mark["rows"] - rows) / (mark["seconds"] - seconds)
        rates = (f"{rate:,.0f}", f"{rate * tokens_a_row:,.0f}") if rate else ("", "")
        table.add_row(
            f"{mark['rows']:,}", mark["what"], f"{mark['seconds']:,.1f}", *rates, f"{mark['peak_bytes'] / 2**20:,.0f}"
        )
        rows, seconds = mark["rows"], mark["seconds"]
    console.print(table)
    done = next(mark for mark in found["marks"] if mark["what"] == "split and counted")
    rate = done["rows"] / done["seconds"]
    console.print(
        f"{rate:,.0f} rows/s and {rate * tokens_a_row:,.0f} tokens/s from file to split; {found['copies_bytes']:,} "
        f"bytes of rows became {found['prepared_bytes']:,} on disk"
    )


def main(argv: Sequence[str]) -> None:
    """Read the flags, measure, and print or write what was found."""
    about = "Measure how fast rows are prepared, and that memory does not grow with their number."
    flags = Parser("data_rate.py", about, {"flags": _FLAGS}).parse(argv)
    recipe = load_recipe(flags["recipe"])
    rows = Path(flags["rows"]) if flags["rows"] else ROWS[str(recipe.datasets()[0].demo)]
    tokenizer = flags["tokenizer"] or f"{STANDIN}{recipe.model.family}"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(recipe, rows, tokenizer, flags["count"], Path(folder))
    print_rates(found, Console())
    if flags["json"]:
        Path(flags["json"]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
