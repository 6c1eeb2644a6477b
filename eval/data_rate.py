"""Measure how fast rows are prepared, beside TRL and the tokenizer alone, and how much memory that takes.

python eval/data_rate.py --rows guanaco_llama2.jsonl --tokenizer path/to/tokenizer --turns 3 --json rate.json

Conversations are made by repeating the rows of a file, each copy with its own number in its first question. In turns,
each in a process of its own:

- recipe: from the file to the split (`prepare`), then every check that a run makes on its rows before it loads a base;
- trl, trl_2: `Dataset.map` with one process and with two, by what SFTTrainer calls for each row: apply_chat_template
  with the same template and a mask of the answers. Reading the file and finding the messages are not in its time;
- tokenizer: encode_batch on the rendered text with offsets, on every core. Reading and rendering are not in its time.

Everything temporary is removed at the end. Memory is the process's anonymous memory (RssAnon), without the pages of
memory-mapped files, which the system can reclaim. Without /proc it is the peak of all its memory.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.flags import Parser, count, file_to_read, file_to_write
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import UsageError
from qlora_recipes.fields import Field
from qlora_recipes.formatters import Formatter, Message, check_conversation, detect
from qlora_recipes.recipe import DatasetSpec, Recipe, load_recipe
from qlora_recipes.settings import STANDIN, resolve
from qlora_recipes.standins import ROWS

_RECIPE = Path(__file__).parent.parent / "recipes" / "llama2_guanaco.py"
_STATUS = Path("/proc/self/status")
_EVERY = 0.05  # seconds between two readings of memory
_TEXTS = 150  # encoded at once by the tokenizer alone, as many as `prepare` does
_FLAGS = (
    Field("recipe", "str", "whose model and formatter (default: Llama-2, Guanaco)", "FILE.py", str(_RECIPE)),
    file_to_read("rows", "a file in the recipe's shape (the bundled rows)"),
    Field("tokenizer", "str", "folder or hub id; the stand-in's by default", "FOLDER", None),
    count("count", "conversations to make (20,000)", 20_000),
    count("turns", "measurements of each (1)", 1),
    Field("only", "str", "measure this alone: recipe, trl, trl_2 or tokenizer", "NAME", None),
    file_to_write("json", "write the figures here", ".json"),
)


@dataclass(frozen=True)
class Job:
    """What is measured."""

    recipe: str
    rows: Path
    tokenizer: str


class Meter:
    """Watches the peak of this process's memory from a thread of its own."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_EVERY):
            self.peak = max(self.peak, _held())


def _held() -> int:
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _formatter(recipe: type[Recipe], rows: Path) -> Formatter:
    return recipe.formatter() or detect(next(read_rows(str(rows)))[1])


def _messages(formatter: Formatter, row: Mapping[str, Any]) -> list[Message]:
    return check_conversation(formatter(row))[0]


def write_copies(recipe: type[Recipe], rows: Path, count: int, file: Path) -> None:
    """Write `count` rows as JSON lines: those of a file over and over, each with its number in its first question."""
    formatter, kept = _formatter(recipe, rows), []
    for _, row in read_rows(str(rows)):
        said = _messages(formatter, row)
        kept.append((row, next((each for each in said if each["role"] == "user"), said[0])["content"]))
    with file.open("w", encoding="utf-8") as out:
        for number, (row, question) in enumerate(islice(cycle(kept), count)):
            out.write(json.dumps(_numbered(row, question, number), ensure_ascii=False) + "\n")


def _numbered(value: Any, question: str, number: int) -> Any:
    """Return a value of a row with a number before the question, wherever it stands."""
    if isinstance(value, str):
        return value.replace(question, f"({number}) {question}", 1)
    if isinstance(value, dict):
        return {name: _numbered(part, question, number) for name, part in value.items()}
    return [_numbered(part, question, number) for part in value] if isinstance(value, list) else value


def measure_recipe(job: Job) -> dict[str, Any]:
    """Return the rates of our rows: to the split, and with every check."""
    from qlora_recipes.base.tokenizer import load_tokenizer
    from qlora_recipes.data.encoding import ConversationEncoder
    from qlora_recipes.data.prepare import prepare
    from qlora_recipes.preflight import BEFORE_LOADING, run_checks
    from qlora_recipes.stages import Prepared, Run

    recipe = load_recipe(job.recipe)

    class Copies(Recipe):
        model = recipe.model
        dataset = DatasetSpec(
            str(job.rows), format_row=_formatter(recipe, job.rows), held_out=recipe.datasets()[0].held_out
        )
        training = recipe.training

    settings = resolve(Copies, model=job.tokenizer, dataset=str(job.rows))
    loaded = load_tokenizer(recipe.model, job.tokenizer, None)
    encoder = ConversationEncoder(loaded, loaded.template)
    with Meter() as meter:
        began = time.monotonic()
        data = prepare(settings, encoder)
        split, peak = time.monotonic() - began, meter.peak
        checks = run_checks(BEFORE_LOADING, Run(Prepared(settings, loaded, encoder, data)))
        checked = time.monotonic() - began
    rows = data.receipt.rows_in
    return {
        "rows/s": rows / split,
        "with every check": rows / checked,
        "tokens/s": data.receipt.tokens * rows / data.receipt.rows_used / split,
        "peak_bytes": meter.peak,
        "peak_bytes_to_the_split": peak,
        "receipt": asdict(data.receipt),
        "checks": [asdict(check) for check in checks],
        "copies_bytes": job.rows.stat().st_size,
        "prepared_bytes": sum(Path(file["filename"]).stat().st_size for file in data.train.dataset().cache_files),
    }


def measure_trl(job: Job, processes: int | None = None) -> dict[str, Any]:
    """Return the rate of what SFTTrainer maps over conversations."""
    from datasets import Dataset, disable_caching, disable_progress_bars

    from qlora_recipes.base.tokenizer import load_tokenizer

    recipe = load_recipe(job.recipe)
    tokenizer: Any = load_tokenizer(recipe.model, job.tokenizer, None)
    formatter = _formatter(recipe, job.rows)
    disable_caching()
    disable_progress_bars()
    rows = Dataset.from_list([{"messages": _messages(formatter, row)} for _, row in read_rows(str(job.rows))])

    def tokenize(example: dict[str, Any]) -> dict[str, Any]:
        options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        found = tokenizer.apply_chat_template(example["messages"], **options)
        return {name: found[name] for name in ("input_ids", "assistant_masks")}

    began = time.monotonic()
    rows.map(tokenize, num_proc=processes, remove_columns=["messages"])
    return {"rows/s": len(rows) / (time.monotonic() - began)}


def measure_two_processes(job: Job) -> dict[str, Any]:
    """Return the rate of the same with num_proc=2."""
    return measure_trl(job, 2)


def measure_tokenizer(job: Job) -> dict[str, Any]:
    """Return the rate of the tokenizer alone, on the text that the template renders."""
    from qlora_recipes.base.tokenizer import load_tokenizer

    recipe = load_recipe(job.recipe)
    tokenizer: Any = load_tokenizer(recipe.model, job.tokenizer, None)
    formatter = _formatter(recipe, job.rows)
    conversations = [_messages(formatter, row) for _, row in read_rows(str(job.rows))]
    texts = [tokenizer.apply_chat_template(said, tokenize=False) for said in conversations]
    began = time.monotonic()
    for start in range(0, len(texts), _TEXTS):
        tokenizer.backend_tokenizer.encode_batch(texts[start : start + _TEXTS], add_special_tokens=False)
    return {"rows/s": len(texts) / (time.monotonic() - began)}


MEASURED = {
    "recipe": measure_recipe,
    "trl": measure_trl,
    "trl_2": measure_two_processes,
    "tokenizer": measure_tokenizer,
}


def print_rates(found: Mapping[str, Sequence[Mapping[str, Any]]], console: Console) -> None:
    """Print the median rate of each, and the rates of all turns."""
    table = Table(box=None, title="Rows per second", title_justify="left")
    for name in ("", "median", "each turn", "peak MiB"):
        table.add_column(name, justify="left" if not name else "right")
    for name, turns in found.items():
        for rate in ("rows/s", "with every check"):
            rates = [turn[rate] for turn in turns if rate in turn]
            if rates:
                of = f"{name}, {'to the split' if rate == 'rows/s' else rate}" if name == "recipe" else name
                peak = "peak_bytes_to_the_split" if rate == "rows/s" else "peak_bytes"
                peaks = [f"{turn[peak] / 2**20:,.0f}" for turn in turns if peak in turn]
                each = " ".join(f"{one:,.0f}" for one in rates)
                table.add_row(of, f"{statistics.median(rates):,.0f}", each, " ".join(peaks))
    console.print(table)
    if "recipe" in found:
        last = found["recipe"][-1]
        size = f"{last['copies_bytes']:,} bytes of rows became {last['prepared_bytes']:,} on disk"
        console.print(f"{last['tokens/s']:,.0f} tokens/s from file to split; {size}")


def main(argv: Sequence[str]) -> None:
    """Read the flags, measure, and print or write what was found."""
    about = "Measure how fast rows are prepared, beside TRL and the tokenizer alone."
    flags = Parser("data_rate.py", about, {"flags": _FLAGS}).parse(argv)
    if flags["only"] not in (None, *MEASURED):
        raise UsageError(f"--only: got {flags['only']!r}, expected one of {', '.join(MEASURED)}")
    recipe = load_recipe(flags["recipe"])
    rows = Path(flags["rows"]) if flags["rows"] else ROWS[str(recipe.datasets()[0].demo)]
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            flags["recipe"], Path(folder, "copies.jsonl"), flags["tokenizer"] or f"{STANDIN}{recipe.model.family}"
        )
        write_copies(recipe, rows, flags["count"], job.rows)
        for _ in range(flags["turns"]):
            for name in [flags["only"]] if flags["only"] else MEASURED:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                    found.setdefault(name, []).append(alone.submit(MEASURED[name], job).result())
    print_rates(found, Console())
    if flags["json"]:
        Path(flags["json"]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
