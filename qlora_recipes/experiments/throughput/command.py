"""`eval/throughput.py`: make a base, let the arms take turns, measure the bound, and tell what came out."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from qlora_recipes import standins
from qlora_recipes.commands.recipe_cli import quiet_libraries, run_command
from qlora_recipes.errors import RecipesError, UsageError
from qlora_recipes.precision import DTYPES, PRECISIONS, precision_named
from qlora_recipes.settings import check_storage

_FORMATS = {"llama2": "guanaco_llama2", "falcon": "openassistant_guanaco"}
_WIDTH = 112  # of a table that goes into a file
_SPREAD = ("tokens_per_second", "supervised_tokens_per_second", "peak_bytes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with 2 and one message when a user can mend what is wrong."""
    quiet_libraries()
    words = list(sys.argv[1:] if arguments is None else arguments)
    run_command(lambda: _run(_parser().parse_args(words)), debug="--debug" in words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="throughput.py",
        description="Tokens/s, memory and loss of a recipe beside the plain TRL script, in turns on this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--family", choices=list(_FORMATS), default="llama2", help="architecture (llama2)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the base; 4096 or 4544 is the 7B (1024)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers; 32 is the 7B (8)")
    parser.add_argument("--words", type=int, help="size of the vocabulary (that of the 7B model)")
    parser.add_argument("--standin", action="store_true", help="the family's stand-in instead of random weights")
    parser.add_argument("--rows", metavar="FILE", help="rows to train on (the bundled ones)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer of the base (the stand-in's)")
    parser.add_argument("--precision", default="nf4", metavar="|".join(PRECISIONS), help="of every arm (nf4)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="16-bit dtype (bfloat16)")
    parser.add_argument("--storage", default="auto", help="of the recipe's 4-bit weights: auto, packed or expanded")
    parser.add_argument("--max_length", type=int, default=2048, help="longest row, in tokens (2048)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="rows of exactly N tokens each instead")
    parser.add_argument("--pieces", action="store_true", help="also the recipe with each piece of its speed left out")
    parser.add_argument("--steps", type=int, default=3, help="steps of 8 rows; the first is not timed (3)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every arm (3)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter on every linear layer (16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them here")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _run(asked: argparse.Namespace) -> None:
    _check(asked)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        figures = [measure(asked, Path(folder), length) for length in asked.lengths or [None]]
    from qlora_recipes.experiments.throughput import results

    for each in figures:
        results.print_table(each, Console(width=None if sys.stdout.isatty() else _WIDTH))
    if asked.json:
        asked.json.write_text(json.dumps(figures if asked.lengths else figures[0], indent=1) + "\n", encoding="utf-8")
    if asked.plot:
        results.plot(figures, asked.plot)


def _check(asked: argparse.Namespace) -> None:
    """Refuse at once what would fail after minutes."""
    if asked.steps < 2 or asked.repeats < 1:
        raise UsageError("--steps: expected at least 2, the first of which is not timed; --repeats: at least 1")
    check_storage(asked.storage, precision_named(asked.precision))
    if asked.layers < 1:
        raise UsageError(f"--layers {asked.layers}: expected at least 1")
    if asked.rows and not Path(asked.rows).is_file():
        raise UsageError(f"--rows {asked.rows}: there is no such file")
    for file in filter(None, (asked.json, asked.plot)):
        if not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: there is no folder {file.parent} to write it into")


def measure(asked: argparse.Namespace, folder: Path, length: int | None) -> dict[str, Any]:
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
            "hidden_size": asked.hidden,
            "num_hidden_layers": asked.layers,
            "standin": asked.standin,
        },
        "rows": {"file": Path(spec.rows).name, "length": length, "max_length": spec.max_length},
        "precision": spec.precision,
        "arms": arms,
        "bound": bound.run_identity(spec, arms["recipe"]),
    }


def _specification(asked: argparse.Namespace, folder: Path, kind: type) -> Any:
    """Make the base, if it is not there yet, and return what the arms share."""
    from transformers import AutoTokenizer

    from qlora_recipes.experiments.throughput.models import SPECS, Shape, make

    standin = standins.STANDINS[asked.family]
    base = standin.folder
    if not asked.standin:
        base = folder / "base"
        words = asked.words or SPECS[asked.family].sizes.vocab_size
        if not base.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(
                asked.tokenizer or standin.folder, **SPECS[asked.family].tokenizer
            )
            if words < len(tokenizer):
                raise UsageError(f"--words {words}: expected at least the tokenizer's {len(tokenizer):,}")
            make(Shape(asked.family, asked.hidden, asked.layers, words), tokenizer, base)
    return kind(
        family=asked.family,
        model=str(base),
        rows=str(asked.rows or standins.ROWS[_FORMATS[asked.family]]),
        format_row=None,
        precision=asked.precision,
        dtype=PRECISIONS[asked.precision].dtype or asked.dtype,
        max_length=asked.max_length,
        steps=asked.steps,
        r=asked.rank,
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
    return json.loads(result.read_text(encoding="utf-8"))


def _median(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the turn of median speed, with the spread of all."""
    ordered = sorted(turns, key=lambda turn: turn["tokens_per_second"])
    middle = dict(ordered[(len(ordered) - 1) // 2])
    for name in _SPREAD:
        values = [turn[name] for turn in turns]
        middle[name] = statistics.median_low(values)
        middle[f"{name}_range"] = [min(values), max(values)]
    return middle
