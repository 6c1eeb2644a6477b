"""A float16 loss scaler skips steps: they are counted and logged, and only too many end the run.

The scaler is PyTorch's own, on a CPU, where autocast stays in bfloat16 and a test makes the gradients overflow.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_survival import SLOW

from qlora_recipes import Recipe
from qlora_recipes.errors import DivergenceError
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import resolve
from qlora_recipes.training import non_finite
from qlora_recipes.training.progress import print_summary
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import RunTrainer

Train = Callable[..., RunFolder]


@pytest.fixture
def run(recipe_for: Callable[..., type[Recipe]], tiny: Callable[[str], Path], tmp_path: Path) -> Train:
    """Return a function that trains four steps, and resumes."""
    recipe, folder = recipe_for(), tmp_path / "run"
    options = dict(model=str(tiny("llama2")), dataset=recipe.dataset.source, output_dir=folder)
    steps = dict(max_steps=4, logging_steps=1, learning_rate=1e-2, save_strategy="steps", save_steps=4)
    return lambda optim="adamw_torch_fused", **also: train(
        resolve(recipe, **options, training={**steps, "optim": optim}), skip_checks=SLOW, **also
    )


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Container[int]], None]:
    """Return a function that has the gradients of some steps overflow under a loss scaler."""
    create, clip = RunTrainer.create_optimizer, RunTrainer._clip_grad_norm

    def arrange(steps: Container[int]) -> None:
        def create_optimizer(self: RunTrainer, *args: Any) -> torch.optim.Optimizer:
            self.args.fp16, self.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=16.0)
            return create(self, *args)

        def clip_grad_norm(self: RunTrainer, model: torch.nn.Module) -> Any:
            if self.state.global_step + 1 in steps:
                next(weight for weight in model.parameters() if weight.grad is not None).grad[0, 0] = float("inf")
            self.accelerator.scaler.unscale_(self.optimizer.optimizer)  # as accelerate does where autocast is float16
            return clip(self, model)

        monkeypatch.setattr(RunTrainer, "create_optimizer", create_optimizer)
        monkeypatch.setattr(RunTrainer, "_clip_grad_norm", clip_grad_norm)

    return arrange


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_skipped_steps_are_counted_and_the_run_is_finished(run: Train, overflow: Callable[..., None]) -> None:
    overflow({1, 3})
    folder = run()
    receipt = folder.receipt()
    assert (receipt.training.steps, receipt.training.skipped_steps) == (4, 2)
    rows = [json.loads(line, parse_constant=refuse) for line in folder.metrics.read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["skipped_steps"] for row in steps] == [1, 1, 2, 2]
    assert ["grad_norm" in row for row in steps] == [False, True, False, True]
    (finite,) = (check for check in receipt.checks if check.name == "losses_finite")
    assert (finite.verdict, "2 steps skipped" in finite.figure) == ("pass", True)
    console = Console(file=io.StringIO(), width=200)
    print_summary(folder, console)
    assert "loss scaler skipped 2 of the steps" in console.file.getvalue()

    (folder.path / "run.json").unlink()  # killed before its receipt
    again = run(resume=True).receipt()
    assert again.training.skipped_steps == 2
    assert again.adapter.final_sha256 == receipt.adapter.final_sha256


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])  # which skips a step by itself
def test_too_many_skipped_steps_end_the_run(
    run: Train, overflow: Callable[..., None], monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    overflow(range(100))
    monkeypatch.setattr(non_finite, "SKIPPED", 2)
    with pytest.raises(DivergenceError) as caught:
        run(optim)
    message = str(caught.value)
    assert "skipped 3 of 3 steps, the last 3 in a row" in message
    assert "--dtype bfloat16" in message and "--learning_rate" in message
    assert "line " in message  # the rows of the batch


@pytest.mark.parametrize(
    ("in_a_row", "skipped", "steps", "too_many"),
    [(24, 24, 24, False), (25, 25, 25, True), (1, 73, 1000, False), (1, 75, 1000, True)],
)
def test_how_many_may_be_skipped(in_a_row: int, skipped: int, steps: int, too_many: bool) -> None:
    assert bool(non_finite.too_many_skipped(in_a_row, skipped, steps)) is too_many


def test_a_nan_is_refused_at_its_step_in_float16_too(
    run: Train, overflow: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RunTrainer.compute_loss

    def compute_loss(self: RunTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 else loss

    overflow(())
    monkeypatch.setattr(RunTrainer, "compute_loss", compute_loss)
    with pytest.raises(DivergenceError, match="the loss of step 2 is nan"):
        run()
