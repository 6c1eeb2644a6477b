"""`eval/throughput.py`: make a base, let the arms take turns, measure the bound, and tell what came out."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.progress import Progress

from qlora_recipes import standins
from qlora_recipes.commands.flags import Parser, count, file_to_read, file_to_write
from qlora_recipes.errors import RecipesError, UsageError
from qlora_recipes.fields import Field
from qlora_recipes.precision import DTYPES, PRECISIONS, precision_named
from qlora_recipes.settings import check_storage

_FORMATS = {"llama2": "guanaco_llama2", "falcon": "openassistant_guanaco"}
_WIDTH = 112  # of a table that goes into a file
_SPREAD = ("tokens_per_second", "supervised_tokens_per_second", "peak_bytes")
_FLAGS = (
    Field("family", f"Literal{list(_FORMATS)}", "architecture (llama2)", "|".join(_FORMATS), "llama2"),
    Field("hidden_size", "int", "width of the base; 4096 or 4544 is the 7B (1024)", "N", 1024),
    count("num_hidden_layers", "decoder layers; 32 is the 7B (8)", 8),
    Field("vocab_size", "int", "size of the vocabulary (that of the 7B model)", "N", None),
    Field("standin", "bool", "the family's stand-in instead of random weights", default=False),
    file_to_read("rows", "rows to train on (the bundled ones)"),
    Field("tokenizer", "str", "tokenizer of the base (the stand-in's)", "FOLDER", None),
    Field("precision", "str", "of every arm (nf4)", "|".join(PRECISIONS), "nf4"),
    Field("dtype", f"Literal{list(DTYPES)}", "16-bit dtype (bfloat16)", "|".join(DTYPES), "bfloat16"),
    Field("storage", "str", "of the recipe's 4-bit weights (auto)", "auto|packed|expanded", "auto"),
    count("max_length", "longest row, in tokens (2048)", 2048, least=8),
    Field("lengths", "list[int]", "rows of exactly N tokens each instead", "N", None),
    Field("pieces", "bool", "also the recipe with each piece of its speed left out", default=False),
    count("steps", "steps of 8 rows; the first is not timed (3)", 3, least=2),
    count("repeats", "turns of every arm (3)", 3),
    count("r", "rank of the adapter on every linear layer (16)", 16),
    file_to_write("json", "write the figures here"),
    file_to_write("plot", "draw them here, as PNG"),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for what a user can fix.
    """
    about = "Tokens/s, memory and loss of a recipe beside the plain TRL script, in turns on this machine."
    _run(SimpleNamespace(**Parser("throughput.py", about, {"flags": _FLAGS}).parse(argv)))


def _run(asked: SimpleNamespace) -> None:
    check_storage(asked.storage, precision_named(asked.precision))
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        figures = [measure(asked, Path(folder), length) for length in asked.lengths or [None]]
    from qlora_recipes.experiments.throughput import results

    for each in figures:
        results.print_table(each, Console(width=None if sys.stdout.isatty() else _WIDTH))
    if asked.json:
        Path(asked.json).write_text(
            json.dumps(figures if asked.lengths else figures[0], indent=1) + "\n", encoding="utf-8"
        )
    if asked.plot:
        results.plot(figures, Path(asked.plot))


def measure(asked: SimpleNamespace, folder: Path, length: int | None) -> dict[str, Any]:
    """Return the figures of one comparison: of the rows as they are, or of rows of one length."""
    from qlora_recipes.experiments.throughput import bound
    from qlora_recipes.experiments.throughput.arms import ARMS, WITHOUT, Specification

    spec = _specification(asked, folder, Specification)
    if length is not None:
        spec = replace(spec, rows=_rows_of(length, folder), max_length=length)
    turns: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*ARMS, *(WITHOUT if asked.pieces else ()))}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for arm in progress.track(list(turns) * asked.repeats, description="arms in turn"):
            turns[arm].append(_in_a_process(arm, asdict(spec), folder))
    arms = {arm: _median(results) for arm, results in turns.items()}
    return {
        "model": {
            "family": asked.family,
            "hidden_size": asked.hidden_size,
            "num_hidden_layers": asked.num_hidden_layers,
            "standin": asked.standin,
        },
        "rows": {"file": Path(spec.rows).name, "length": length, "max_length": spec.max_length},
        "precision": spec.precision,
        "arms": arms,
        "bound": bound.run_identity(spec, arms["recipe"]),
    }


def _specification(asked: SimpleNamespace, folder: Path, kind: type) -> Any:
    """Make the base, if it is not there yet, and return what the arms share."""
    from transformers import AutoTokenizer

    from qlora_recipes.experiments.throughput.models import SPECS, Shape, make

    standin = standins.STANDINS[asked.family]
    base = standin.folder
    if not asked.standin:
        base = folder / "base"
        vocab_size = asked.vocab_size or SPECS[asked.family].sizes.vocab_size
        if not base.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(
                asked.tokenizer or standin.folder, **SPECS[asked.family].tokenizer
            )
            if vocab_size < len(tokenizer):
                raise UsageError(
                    f"--vocab_size: got {vocab_size}, expected at least the tokenizer's {len(tokenizer):,}"
                )
            make(Shape(asked.family, asked.hidden_size, asked.num_hidden_layers, vocab_size), tokenizer, base)
    return kind(
        family=asked.family,
        model=str(base),
        rows=str(asked.rows or standins.ROWS[_FORMATS[asked.family]]),
        format_row=None,
        precision=asked.precision,
        dtype=PRECISIONS[asked.precision].dtype or asked.dtype,
        max_length=asked.max_length,
        steps=asked.steps,
        r=asked.r,
        seed=0,
        storage=asked.storage if PRECISIONS[asked.precision].quant_type else "auto",
    )


def _rows_of(length: int, folder: Path) -> str:
    """Write rows that are cut at `length` tokens each, and return the file."""
    file = folder / f"rows-{length}.jsonl"
    words = " ".join(f"word {number}" for number in range(length))
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": words}]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(256)), encoding="utf-8")
    return str(file)


def _in_a_process(arm: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train an arm by itself, so that no arm's memory or warm caches are another's."""
    given, result = folder / "specification.json", folder / "result.json"
    given.write_text(json.dumps(spec), encoding="utf-8")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "qlora_recipes.experiments.throughput.arms", arm, str(given), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode or not result.is_file():
        raise RecipesError(f"the arm {arm} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads(result.read_text(encoding="utf-8")))


def _median(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the turn of median speed, with the spread of all."""
    ordered = sorted(turns, key=lambda turn: turn["tokens_per_second"])
    middle = dict(ordered[(len(ordered) - 1) // 2])
    for name in _SPREAD:
        values = [turn[name] for turn in turns]
        middle[name] = statistics.median_low(values)
        middle[f"{name}_range"] = [min(values), max(values)]
    return middle
