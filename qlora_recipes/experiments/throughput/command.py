"""`qlora-recipes throughput`: make a base, let the arms take turns, measure the bound, and tell what came out.

Trains nothing itself.
"""

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
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from qlora_recipes import standins
from qlora_recipes.commands.flags import Parser, count, file_to_read, file_to_write
from qlora_recipes.errors import RecipesError, UsageError
from qlora_recipes.experiments.throughput import results
from qlora_recipes.fields import Field
from qlora_recipes.precision import DTYPES, PRECISIONS, precision_named
from qlora_recipes.settings import check_storage

if TYPE_CHECKING:
    from qlora_recipes.experiments.throughput.arms import Specification

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
    Field("storage", "str", "of the recipe's weights (auto)", "auto|packed|expanded|blocked", "auto"),
    count("max_length", "longest row, in tokens (2048)", 2048, least=8),
    Field("lengths", "list[int]", "rows of exactly N tokens each instead", "N", None),
    Field("pieces", "bool", "also the recipe with each piece of its speed left out", default=False),
    count("steps", "steps of 8 rows, each other ones; the first is not timed (4)", 4, least=2),
    count("repeats", "turns of every arm (3)", 3),
    count("r", "rank of the adapter on every linear layer (16)", 16),
    file_to_write("json", "write the figures here", ".json"),
    file_to_write("plot", "draw them here, as PNG", ".png"),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for what a user can fix.
    """
    about = "Tokens/s, memory and loss of a recipe beside scripts that use TRL alone, in turns on this machine."
    asked = SimpleNamespace(**Parser("qlora-recipes throughput", about, {"flags": _FLAGS}).parse(argv))
    check_storage(asked.storage, precision_named(asked.precision))
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        spec = _specification(asked, Path(folder))
        figures = [measure(asked, spec, length, Path(folder)) for length in asked.lengths or [None]]
    for each in figures:
        results.print_table(each, Console(width=None if sys.stdout.isatty() else _WIDTH))
    if asked.json:
        text = json.dumps(figures if asked.lengths else figures[0], indent=1)
        Path(asked.json).write_text(text + "\n", encoding="utf-8")
    if asked.plot:
        results.plot(figures, Path(asked.plot))


def measure(asked: SimpleNamespace, spec: Specification, length: int | None, folder: Path) -> dict[str, Any]:
    """Return the figures of one comparison: of the rows as they are, or of rows of one length."""
    from qlora_recipes.experiments.throughput import bound
    from qlora_recipes.experiments.throughput.arms import ARMS, WITHOUT

    if length is not None:
        spec = replace(spec, rows=_rows_of(length, folder), max_length=length)
    turns: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*ARMS, *(WITHOUT if asked.pieces else ()))}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for arm in progress.track(list(turns) * asked.repeats, description="arms in turn"):
            turns[arm].append(in_a_process(arm, spec, folder))
    arms = {arm: _median(found) for arm, found in turns.items()}
    return {
        "model": {name: getattr(asked, name) for name in ("family", "hidden_size", "num_hidden_layers", "standin")},
        "rows": {"file": Path(spec.rows).name, "length": length, "max_length": spec.max_length},
        "precision": spec.precision,
        "arms": arms,
        "bound": bound.of_arm(spec.model, spec.dtype, arms["recipe"]),
    }


def _specification(asked: SimpleNamespace, folder: Path) -> Specification:
    """Make the base, unless it is the stand-in, and return what the arms share."""
    from transformers import AutoTokenizer

    from qlora_recipes.experiments.throughput.arms import SPECS, Specification, base_config, make_base

    base = standins.STANDINS[asked.family].folder
    if not asked.standin:
        model = SPECS[asked.family]
        assert model.sizes is not None
        try:
            tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer or base, **model.tokenizer)
        except (OSError, ValueError) as error:
            expected = "expected a folder with tokenizer.json"
            raise UsageError(f"--tokenizer {asked.tokenizer}: {expected}; {str(error).splitlines()[0]}") from error
        base, vocab_size = folder / "base", asked.vocab_size or model.sizes.vocab_size
        if vocab_size < len(tokenizer):
            raise UsageError(f"--vocab_size: got {vocab_size}, expected at least the tokenizer's {len(tokenizer):,}")
        config = base_config(asked.family, asked.hidden_size, asked.num_hidden_layers, vocab_size)
        make_base(config, tokenizer, base)
    precision = precision_named(asked.precision)
    shared = {name: getattr(asked, name) for name in ("family", "precision", "max_length", "steps", "r")}
    return Specification(
        model=str(base),
        rows=str(asked.rows or standins.ROWS[_FORMATS[asked.family]]),
        dtype=precision.dtype or asked.dtype,
        storage=asked.storage,
        **shared,
    )


def _rows_of(length: int, folder: Path) -> str:
    """Write rows that are cut at `length` tokens each, and return the file."""
    file = folder / f"rows-{length}.jsonl"
    words = " ".join(f"word {number}" for number in range(length))
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": words}]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(256)), encoding="utf-8")
    return str(file)


def in_a_process(arm: str, spec: Specification, folder: Path) -> dict[str, Any]:
    """Train an arm by itself, so that no arm's memory or warm caches are another's."""
    given, result = folder / "specification.json", folder / "result.json"
    given.write_text(json.dumps(asdict(spec)), encoding="utf-8")
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
