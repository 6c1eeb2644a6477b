"""What a tracker gets, tried offline with TensorBoard: the loss of every step, and the run's figures at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runs import answers, make_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora_recipes import Recipe
from qlora_recipes.commands import compare
from qlora_recipes.errors import UsageError
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


def test_a_verdict_goes_to_the_tracker_too(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path, precision, scores=answers(200))) for precision in ("nf4", "bf16")]
    compare.main([*runs, "--report_to", "tensorboard"])
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    (report,) = tmp_path.rglob("report.json")
    found = json.loads(report.read_text())["contrasts"][0]
    assert events.Scalars("verdict/nf4/difference")[-1].value == pytest.approx(found["overall"]["difference"], abs=1e-6)
    assert events.Tensors("verdict/nf4/text_summary")[-1].tensor_proto.string_val[0].decode() == found["sentence"]


@pytest.mark.parametrize(("tracker", "said"), [("tensorbord", "mean 'tensorboard'"), ("aim", "pip install aim")])
def test_a_tracker_that_cannot_be_used_is_refused(tmp_path: Path, tracker: str, said: str) -> None:
    runs = [str(make_run(tmp_path, precision, scores=answers(200))) for precision in ("nf4", "bf16")]
    with pytest.raises(UsageError, match=said):
        compare.main([*runs, "--report_to", tracker])
