"""One benchmark with real training, scoring, controls and divergence, on random models of two layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_recipes.comparison.findings import Report
from qlora_recipes.experiments.benchmark import command, training
from qlora_recipes.experiments.benchmark.plan import Plan, plan_benchmark
from qlora_recipes.report.page import read_report

RECIPE = Path(__file__).parent.parent / "recipes" / "llama2_guanaco.py"


@pytest.fixture(scope="module")
def benchmark(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("benchmark") / "b"
    flags = {"demo": True, "model": str(tiny("llama2")), "max_steps": 3, "max_length": 128, "warmup_steps": 0}
    plan = plan_benchmark(
        RECIPE,
        precisions=["nf4", "bf16"],
        seeds=[0],
        margin=1.0,
        tasks=["held_out", "held_out_answers"],
        limit=3,
        flags=flags,
        output=output,
    )

    def train_here(plan: Plan, arm: Any, console: Any, launch: Any) -> None:
        from qlora_recipes.training.train import train  # in this process: a fresh one takes seconds to import

        train(arm.settings, console=console)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_train", train_here)
        command.run(plan)
    report = read_report(output / "report")
    assert report is not None
    return output, report


def test_the_arms_are_measured_and_compared(benchmark: tuple[Path, Report]) -> None:
    _, report = benchmark
    (found,) = report.contrasts
    assert (found.name, found.baseline, report.limit) == ("nf4", "bf16", 3)
    assert [task.task for task in found.tasks] == ["held_out_answers"]
    assert found.bits[0].a == pytest.approx(found.bits[0].b, rel=0.05)


def test_divergence_is_small_and_not_zero(benchmark: tuple[Path, Report]) -> None:
    found = benchmark[1].contrasts[0].divergence
    assert found is not None
    assert 0 < found.median_kl <= found.mean_kl < 0.5
    assert 50 < found.same_top_1 <= 100


def test_quantization_error_of_every_layer(benchmark: tuple[Path, Report]) -> None:
    errors = benchmark[1].contrasts[0].quantization_error
    assert len(errors) == 2 * 7
    assert all(0.07 < layer.relative_error < 0.12 for layer in errors)  # NF4 of normal weights: about 0.09


def test_controls_are_scored(benchmark: tuple[Path, Report]) -> None:
    output, report = benchmark
    assert [control.name for control in report.controls] == [
        "bf16 base before tuning",
        "nf4 base before tuning",
        "bf16 adapter on the nf4 base",
    ]
    assert json.loads((output / "benchmark.json").read_text())["margins"] == [1.0]
