"""Runs at each stage for the tests of the preflight: small, quick, and each test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.data.figures import RowMeter
from qlora_recipes.data.prepare import PreparedData
from qlora_recipes.preflight import ReadRun, ReadyRun, run_checks
from qlora_recipes.recipe import Recipe
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Check
from qlora_recipes.settings import resolve
from qlora_recipes.training.build import build_trainer, load_model, prepare_rows


def read(recipe: type[Recipe], model: Path, **options: object) -> ReadRun:
    return prepare_rows(resolve(recipe, model=str(model), **options))


def ready(recipe: type[Recipe], model: Path, folder: Path, **options: object) -> ReadyRun:
    loaded = load_model(read(recipe, model, output_dir=folder, **options))
    return ReadyRun(**vars(loaded), trainer=build_trainer(loaded, RunFolder(folder)))


def verdict_of(check: Callable[..., Check], run: object) -> Check:
    return run_checks([check], run)[0]


def with_rows(run: ReadRun, messages: Sequence[tuple[str, str]]) -> ReadRun:
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


def with_data(run: ReadRun, **rows: Sequence[Conversation]) -> ReadRun:
    """Return the run with other rows in `train` or `held_out`, and their figures."""
    return ReadRun(**{**vars(run), "data": other_rows(run, **rows)})


def other_rows(run: ReadRun, **rows: Sequence[Conversation]) -> PreparedData:
    """Return the data of a run with other rows in `train` or `held_out`, and their figures."""
    meter = RowMeter(run.encoder)
    names = {"train": "figures", "held_out": "held_out_figures"}
    return replace(run.data, **rows, **{names[name]: meter.measure(given) for name, given in rows.items()})
