"""What a tracker gets, tried offline with TensorBoard: the loss of every step, and the run's figures at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora_recipes import Recipe
from qlora_recipes.run.files import read_lines
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train


@pytest.fixture(scope="module")
def folder(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    output_dir = tmp_path_factory.mktemp("tracked") / "run"
    training = {"report_to": ["tensorboard"], "learning_rate": 0.05}
    return train(resolve(recipe_for(), model=str(tiny("llama2")), output_dir=output_dir, training=training))


def test_the_event_file_has_every_loss_and_the_runs_figures(folder: RunFolder) -> None:
    (file,) = folder.path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    logged = {row["step"]: row["loss"] for row in read_lines(folder.metrics, dict, fix="") if "loss" in row}
    assert {event.step: pytest.approx(event.value) for event in events.Scalars("train/loss")} == logged
    assert len(logged) == 3
    receipt = folder.receipt()
    figures = {name.removeprefix("train/run/"): events.Scalars(name)[-1] for name in events.Tags()["scalars"]}
    assert figures["supervised_tokens"].value == receipt.data.supervised_tokens
    assert figures["linears_quantized"].value == receipt.base.quantized.found == 14
    assert figures["final_loss"].value == pytest.approx(receipt.training.final_loss)
    assert figures["final_loss"].step == 3


def test_the_figures_of_the_tracker_are_not_in_the_metrics(folder: RunFolder) -> None:
    assert "run/" not in folder.metrics.read_text()
