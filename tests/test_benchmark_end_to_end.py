"""One benchmark with real training, scoring, controls and divergence, on random models of two layers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kill_and_resume import outcome
from rich.console import Console

from qlora_recipes import load_recipe
from qlora_recipes.commands.recipe_cli import parse, settings_from
from qlora_recipes.comparison.findings import Report
from qlora_recipes.experiments.benchmark import command, share
from qlora_recipes.experiments.benchmark.jobs import Job, SideBySide
from qlora_recipes.experiments.benchmark.plan import Plan, plan_benchmark
from qlora_recipes.report.page import read_report
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.training.train import train

RECIPE = Path(__file__).parent.parent / "recipes" / "llama2_guanaco.py"
KEPT = ("*.docs.jsonl", "adapter_model.safetensors", "divergence/*", "answers.*", "*-seed0/held_out.json", "*.jinja")
MEASURED = r'"(peak_bytes|tokens_per_second|seconds)": [\d.]+|\d{4}-\d\d-\d\d[T ][\d:+]+'
SLOW = ["answers_end", "gradient_after_evaluation", "packing_leak", "starting_loss", "tokenizer_reloads"]


def plan_in(output: Path, model: Path) -> Plan:
    flags = {
        "demo": True,
        "model": str(model),
        "max_steps": 3,
        "max_length": 128,
        "warmup_steps": 0,
        "skip_checks": SLOW,
    }
    return plan_benchmark(
        RECIPE,
        precisions=["nf4", "bf16"],
        seeds=[0],
        margin=1.0,
        tasks=["held_out", "held_out_answers"],
        limit=3,
        flags={**flags, "skip_checks": SLOW},
        output=output,
    )


def run_here(job: Job) -> None:
    """Do a job in this process: a fresh one takes seconds to import."""
    if job.trains:
        recipe = load_recipe(RECIPE)
        train(settings_from(recipe, parse(recipe, job.words[4:])), skip_checks=SLOW, console=Console(quiet=True))
    else:
        share.main(job.words[2:])


@pytest.fixture(scope="module")
def benchmark(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("benchmark") / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideBySide, "run", lambda _, jobs, console: [run_here(job) for job in jobs])
        command.run(plan_in(output, tiny("llama2")))
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


class ScoringHere:
    """Side by side, but for the scoring, whose commands this process runs, and only where `scored` has no result."""

    several, apart, workers = True, False, 2

    def __init__(self, scored: Path) -> None:
        self.scored = scored

    def run(self, jobs: Sequence[Job], console: Console) -> None:
        SideBySide(2).run(training := [job for job in jobs if job.trains], console)
        for job in training:
            scored = self.scored / job.folder.path.name
            shutil.copytree(scored / "evaluation", job.folder.evaluation)
            for answers in scored.glob("answers.json"):
                shutil.copy(answers, job.folder.path)
        for job in jobs:
            if not job.trains:
                run_here(job)


@pytest.fixture(scope="module")
def beside(
    benchmark: tuple[Path, Report], tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the same benchmark, its arms trained side by side, and one of them scored by a job."""
    folder = tmp_path_factory.mktemp("beside")
    scored = Path(shutil.copytree(benchmark[0], folder / "scored"))
    for file in (scored / "nf4-seed0" / "evaluation").glob("*.*"):
        file.unlink()
    command.run(plan_in(folder / "b", tiny("llama2")), engine=ScoringHere(scored))
    return folder / "b"


def test_side_by_side_the_bytes_are_the_same(benchmark: tuple[Path, Report], beside: Path) -> None:
    same(benchmark[0], beside)


@pytest.mark.slow
def test_with_every_scoring_in_a_process_too(
    benchmark: tuple[Path, Report], tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SideBySide, "apart", True)
    command.run(plan_in(tmp_path / "b", tiny("llama2")), engine=SideBySide(2))
    same(benchmark[0], tmp_path / "b")


def same(output: Path, beside: Path) -> None:
    """Compare two benchmarks: the bytes that they keep, their receipts, and the report but for times and memory."""
    files = [file for kind in KEPT for file in output.rglob(kind)]
    assert len(files) == 21
    for file in files:
        assert (beside / file.relative_to(output)).read_bytes() == file.read_bytes(), file
    for name in ("bf16-seed0", "nf4-seed0"):
        assert outcome(beside / name) == outcome(output / name)
        one, other = (RunFolder(folder / name).receipt() for folder in (output, beside))
        for part in ("base", "data", "template", "adapter", "settings", "seed"):
            assert getattr(one, part) == getattr(other, part)
        assert (beside / "logs" / f"{name}.log").read_text().count("Everything is in") == 1

    reports = [(folder / "report" / "report.json").read_text() for folder in (output, beside)]
    assert re.sub(MEASURED, "", reports[0]) == re.sub(MEASURED, "", reports[1])
