"""Runs at each stage for the tests of the preflight: small, quick, and each test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.data.figures import RowMeter
from qlora_recipes.preflight import run_checks
from qlora_recipes.recipe import Recipe
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Check
from qlora_recipes.settings import resolve
from qlora_recipes.stages import Run
from qlora_recipes.training.build import build_trainer, load_model, prepare_rows


def read(recipe: type[Recipe], model: Path, **options: object) -> Run:
    return prepare_rows(resolve(recipe, model=str(model), **options))


def ready(recipe: type[Recipe], model: Path, folder: Path, **options: object) -> Run:
    loaded = load_model(read(recipe, model, output_dir=folder, **options))
    return replace(loaded, built=build_trainer(loaded, RunFolder(folder)))


def changed(run: Run, **prepared: object) -> Run:
    """Return the run with other settings, tokenizer, encoder or data."""
    return replace(run, prepared=replace(run.prepared, **prepared))


def verdict_of(check: Callable[..., Check], run: object) -> Check:
    return run_checks([check], run)[0]


def with_rows(run: Run, messages: Sequence[tuple[str, str]]) -> Run:
    """Return the run with other conversations, of one question and answer each, to train on."""
    rows = [
        replace(
            run.data.train[0],
            place=f"row {i}",
            messages=(said := [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]),
            encoded=run.encoder.encode(said),
        )
        for i, (asked, answer) in enumerate(messages)
    ]
    return with_data(run, train=rows)


def with_data(run: Run, **rows: Sequence[Conversation]) -> Run:
    """Return the run with other rows in `train` or `held_out`, and their figures."""
    meter = RowMeter(run.encoder)
    names = {"train": "figures", "held_out": "held_out_figures"}
    data = replace(run.data, **rows, **{names[name]: meter.measure(given) for name, given in rows.items()})
    return changed(run, data=data)
