"""A benchmark trains and scores what is missing, and interrupted anywhere gives the report of one that was not."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import answers, flipped, make_run, receipt, write_results
from rich.console import Console

from qlora_recipes import load_recipe
from qlora_recipes.commands import compare
from qlora_recipes.commands.recipe_cli import parse, settings_from
from qlora_recipes.comparison.preregistration import departures
from qlora_recipes.errors import CheckError, RecipesError, RunFolderError, UsageError
from qlora_recipes.evaluation import harness, kl
from qlora_recipes.evaluation.records import Divergence, TaskResult, finished_tasks, read_divergence, write_divergence
from qlora_recipes.experiments.benchmark import command, plan, scoring, training
from qlora_recipes.experiments.benchmark.jobs import Job, SideBySide, stop
from qlora_recipes.experiments.benchmark.plan import Plan, plan_benchmark
from qlora_recipes.report.page import read_report
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import SettingsReceipt
from qlora_recipes.run.signals import Stopped
from qlora_recipes.training.journal import settings_identity

RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE = RECIPES / "llama2_guanaco.py"
ROOT = RECIPES.parent


def plan_of(output: Path, precisions: tuple[str, ...] = ("nf4", "bf16"), **options: Any) -> Plan:
    given = {"precisions": precisions, "seeds": [0, 1], "margin": 1.0, "tasks": ["standin_choice"], "output": output}
    flags = {"demo": True, **options.pop("flags", {})}
    return plan_benchmark(RECIPE, flags=flags, **given | options)


# The plan


def test_a_plan_has_every_arm_with_the_baseline_first(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, flags={"max_steps": 5})
    assert (plan.baseline, plan.precisions) == ("bf16", ["bf16", "nf4"])
    assert [arm.name for arm in plan.arms] == ["bf16, seed 0", "nf4, seed 0", "bf16, seed 1", "nf4, seed 1"]
    assert plan.arms[1].folder.path == tmp_path / "nf4-seed0"
    assert {arm.settings.training["max_steps"] for arm in plan.arms} == {5}
    assert "--demo" in plan.arms[0].argv


def test_of_more_than_two_the_first_is_the_baseline(tmp_path: Path) -> None:
    assert plan_of(tmp_path, ("bf16", "nf4", "fp4")).baseline == "bf16"
    assert plan_of(tmp_path, ("nf4", "fp4", "int8")).baseline == "nf4"


def test_the_quantized_arms_compute_in_the_baselines_dtype(tmp_path: Path) -> None:
    assert {arm.settings.dtype for arm in plan_of(tmp_path, ("nf4", "fp16")).arms} == {"float16"}
    assert {arm.settings.dtype for arm in plan_of(tmp_path).arms} == {"bfloat16"}


def test_of_three_arms_the_quantized_ones_compute_in_the_16_bit_arms_dtype(tmp_path: Path) -> None:
    assert {arm.settings.dtype for arm in plan_of(tmp_path, ("nf4", "fp4", "fp16")).arms} == {"float16"}


@pytest.mark.parametrize(
    "flags",
    [
        {"run_name": "float16"},
        {"run_name": "--dtype", "hub_model_id": "--a b"},
        {"run_name": "12:30", "save_strategy": "no", "eval_steps": None, "packing": False, "demo": True},
        {"target_modules": ["q_proj"], "report_to": ["tensorboard"], "skip_checks": ["hub", "steps"]},
        {"target_modules": "all-linear", "lr_scheduler_kwargs": {"num_cycles": 2}, "learning_rate": 1e-05},
    ],
)
@pytest.mark.parametrize("precisions", [("nf4", "bf16"), ("nf4", "fp16")])
def test_every_arm_gets_the_flags_as_they_were_given(
    tmp_path: Path, precisions: tuple[str, ...], flags: dict[str, Any]
) -> None:
    for arm in plan_of(tmp_path, precisions, flags=flags).arms:
        found = parse(load_recipe(RECIPE), arm.argv)
        assert found.items() >= flags.items()
        assert settings_from(load_recipe(RECIPE), found).training == arm.settings.training
        assert settings_from(load_recipe(RECIPE), found).lora == arm.settings.lora
        assert found["output_dir"] == str(arm.folder.path)


@pytest.mark.parametrize(
    ("words", "launch"),
    [
        ([], None),
        (["--launch"], []),
        (["--launch", "--num_processes 2"], ["--num_processes", "2"]),
        (["--launch=--cpu"], ["--cpu"]),
    ],
)
def test_flags_of_the_command_are_kept_from_those_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], launch: list[str] | None
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(command, "run", lambda plan, **options: called.append((plan, options)))
    (tmp_path / "flags.yaml").write_text("max_steps: 5\nrun_name: 12:30\n")
    given = ["--precisions", "nf4,bf16", "--seeds", "0", "1", "--config", str(tmp_path / "flags.yaml"), "--r", "8"]
    command.main([str(RECIPE), *given, *words, "--limit", "30", "--demo"])
    [(plan, options)] = called
    assert plan.flags == {"max_steps": 5, "run_name": "12:30", "r": 8, "demo": True}
    assert (plan.limit, plan.seeds, plan.precisions) == (30, [0, 1], ["bf16", "nf4"])
    assert options == {"launch": launch, "controls": True, "engine": SideBySide(1)}


def test_no_secret_is_written_down_with_the_flags(tmp_path: Path, laboratory: Laboratory) -> None:
    command.run(plan_of(tmp_path, flags={"hub_token": "hf_" + "x" * 30, "max_steps": 5}))
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["flags"] == ["--hub_token", "***", "--max_steps", "5"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precisions": ["nf4"]}, "expected two or more"),
        ({"precisions": ["nf4", "nf4"]}, "nf4 is given twice"),
        ({"precisions": ["nf4", "bf61"]}, "Did you mean 'bf16'"),
        ({"precisions": ["bf16", "fp16"]}, "different dtypes"),
        ({"seeds": [1, 1]}, "1 is given twice"),
        ({"flags": {"seed": 3}}, "--seed is set by the benchmark .* --seeds"),
        ({"flags": {"precision": "nf4"}}, "--precisions"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan_of(tmp_path, **options)


# Doing it, with fakes for what takes long


class Laboratory:
    """Stands in for training and scoring: writes what they would, and can be interrupted before any piece of work."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.interrupt_at = -1

    def work(self, what: str) -> None:
        if len(self.done) == self.interrupt_at:
            raise KeyboardInterrupt
        self.done.append(what)

    def run(self, jobs: Sequence[Job], *_: Any) -> None:
        for job in jobs:
            self.train(job)

    def train(self, job: Job) -> None:
        shutil.rmtree(job.folder.path, ignore_errors=True)
        job.folder.path.mkdir(parents=True)
        (job.folder.path / "metrics.jsonl").write_text("")
        asked = settings_from(load_recipe(RECIPE), parse(load_recipe(RECIPE), job.words[4:]))
        precision, seed = asked.precision.name, asked.seed
        self.work(f"train {precision} {seed}")
        shutil.rmtree(job.folder.path)
        settings = SettingsReceipt(dict(asked.lora), dict(asked.training), [])
        make_run(job.folder.path.parent, precision, seed, receipt={"settings": settings})

    def evaluate(self, folders: list[RunFolder], tasks: Any, *, options: Any, overwrite: bool, **_: Any) -> Any:
        return [[self._evaluate_one(folder, options, overwrite)] for folder in folders]

    def _evaluate_one(self, folder: RunFolder, options: Any, overwrite: bool) -> TaskResult:
        content = folder.receipt()
        output = folder.evaluation / options.control(content)
        if "standin_choice" not in finished_tasks(output) or overwrite:
            precision = options.precision or content.precision
            self.work(f"score {folder.path.name} {output.name}")
            run = replace(content, precision=precision, base=receipt(precision, content.seed).base)
            scores = flipped(answers(120), content.seed + (5 if precision == "nf4" else 0))
            scores = scores if options.adapter else answers(120, wrong=0.7)
            write_results(
                output, run, scores[: options.limit], adapter=options.adapter, limit=options.limit, text=False
            )
        return finished_tasks(output)["standin_choice"]

    def measure(self, reference: RunFolder, others: list[RunFolder], **_: Any) -> None:
        for other in others:
            if read_divergence(reference, other) is None:
                self.work(f"divergence {other.path.name}")
                write_divergence(reference, other, Divergence(900, 0.01, 0.001, 0.2, 97.5))


@pytest.fixture
def laboratory(monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    fake = Laboratory()
    monkeypatch.setattr(plan, "_now", lambda: f"2026-01-{len(fake.done) + 1:02}T10:00:00+00:00")
    monkeypatch.setattr(SideBySide, "run", lambda _, jobs, console: fake.run(jobs))
    monkeypatch.setattr(harness, "evaluate_many", fake.evaluate)
    monkeypatch.setattr(kl, "measure", fake.measure)
    return fake


def report_of(output: Path) -> bytes:
    return b"".join((output / "report" / name).read_bytes() for name in ("report.json", "report.md", "index.html"))


def test_everything_is_done_once(tmp_path: Path, laboratory: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    command.run(plan_of(tmp_path / "b"))
    assert laboratory.done == [
        *("train bf16 0", "train nf4 0", "train bf16 1", "train nf4 1"),
        *("score bf16-seed0 base", "score bf16-seed0 evaluation", "score bf16-seed1 evaluation"),
        *("score nf4-seed0 base", "score nf4-seed0 evaluation", "score nf4-seed1 evaluation"),
        *("score bf16-seed0 on-nf4", "score bf16-seed1 on-nf4"),
        *("divergence bf16-seed1", "divergence nf4-seed0"),
    ]
    said = capsys.readouterr().out
    assert "nf4" in said and "bf16" in said and str(tmp_path / "b" / "report" / "index.html") in said
    before = report_of(tmp_path / "b")
    command.run(plan_of(tmp_path / "b"))
    assert len(laboratory.done) == 14 and report_of(tmp_path / "b") == before


def test_processes_that_score_side_by_side_share_everything(tmp_path: Path, laboratory: Laboratory) -> None:
    found = plan_of(tmp_path / "b")
    training.train_missing(found, Console(quiet=True))
    shares = [[shlex.split(line) for line in job.words[2:]] for job in scoring.shared_jobs(found, 2)]
    assert [len(share) for share in shares] == [5, 4]
    dealt = [words for share in shares for words in share]
    apart = [shlex.split(line) for job in scoring.missing_jobs(found, ["standin_choice"]) for line in job.words[2:]]
    assert sorted(dealt) == sorted(apart)
    assert [words[0] for words in dealt].count("divergence") == 1
    assert {words[1] for words in dealt if words[0] == "evaluate"} == {str(arm.folder.path) for arm in found.arms}


def test_interrupted_anywhere_it_gives_the_same_report(tmp_path: Path, laboratory: Laboratory) -> None:
    command.run(plan_of(tmp_path / "whole"))
    whole, pieces = report_of(tmp_path / "whole"), len(laboratory.done)
    laboratory.done.clear()
    for interrupted in range(pieces):
        laboratory.interrupt_at = interrupted
        with pytest.raises(KeyboardInterrupt):
            command.run(plan_of(tmp_path / "b"))
        assert not (tmp_path / "b" / "report").exists()
    laboratory.interrupt_at = -1
    command.run(plan_of(tmp_path / "b"))
    assert len(laboratory.done) == pieces
    assert report_of(tmp_path / "b") == whole


def lose(*paths: str) -> Callable[[Path], None]:
    def remove(output: Path) -> None:
        for path in paths:
            target = output / path
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    return remove


def spoil(output: Path) -> None:
    file = output / "nf4-seed1" / "evaluation" / "standin_choice.docs.jsonl"
    file.write_text(file.read_text()[:-30])


@pytest.mark.parametrize(
    "damage",
    [
        lose("report"),
        lose("nf4-seed1/evaluation"),
        lose("bf16-seed0/run.json"),
        lose("bf16-seed0", "nf4-seed0/evaluation/divergence"),
        lose("bf16-seed0/evaluation/base", "bf16-seed1/evaluation/on-nf4"),
        spoil,
    ],
)
def test_what_is_lost_is_made_again(tmp_path: Path, laboratory: Laboratory, damage: Callable[[Path], None]) -> None:
    command.run(plan_of(tmp_path))
    whole = report_of(tmp_path)
    damage(tmp_path)
    command.run(plan_of(tmp_path))
    assert report_of(tmp_path) == whole


def test_a_margin_that_was_changed_is_told(tmp_path: Path, laboratory: Laboratory) -> None:
    command.run(plan_of(tmp_path, margin=0.5))
    command.run(plan_of(tmp_path, margin=3.0))
    assert json.loads((tmp_path / "benchmark.json").read_text())["margins"] == [0.5, 3.0]
    assert "±0.5 points before" in (tmp_path / "report" / "report.md").read_text()


def exploratory(output: Path) -> list[str]:
    """What a report says of its departures; the evidence says the same."""
    found = read_report(output)
    assert found is not None
    (fact,) = (fact for fact in found.validity if fact.name == "fixed beforehand")
    assert (fact.verdict == "warn") == bool(found.exploratory)
    return found.exploratory


def test_what_is_done_as_it_was_fixed_is_confirmatory(
    tmp_path: Path, laboratory: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(plan_of(tmp_path))
    said = capsys.readouterr()
    for line in ("arms    bf16 (baseline), nf4", "tasks   standin_choice", "margin  ±1 points", "seeds   0, 1: 4 runs"):
        assert line in said.err
    assert "Exploratory" not in said.out and exploratory(tmp_path / "report") == []
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["fixed"] == "2026-01-01T10:00:00+00:00" and written["scored_before"] == []
    command.run(plan_of(tmp_path))  # days later
    assert json.loads((tmp_path / "benchmark.json").read_text()) == written
    assert exploratory(tmp_path / "report") == []


def test_a_departure_from_what_was_fixed_is_told_everywhere(
    tmp_path: Path, laboratory: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(plan_of(tmp_path))
    runs = [str(tmp_path / f"{precision}-seed0") for precision in ("nf4", "bf16")]
    capsys.readouterr()
    compare.main([*runs, "--margin", "2", "--baseline", "nf4", "--output", str(tmp_path / "elsewhere")])
    told = exploratory(tmp_path / "elsewhere")
    assert told == [
        "the margin is ±2 where ±1 was fixed on 2026-01-01 10:00 UTC before the first score",
        "the baseline is nf4 where bf16 was fixed on 2026-01-01 10:00 UTC before the first score",
        "seeds left out of those fixed on 2026-01-01 10:00 UTC: 1",
    ]
    assert f"Exploratory: {told[0]}; " in capsys.readouterr().out
    for page in ("index.html", "report.md"):
        assert told[0] in (tmp_path / "elsewhere" / page).read_text()
    command.run(plan_of(tmp_path, seeds=[0, 1, 2]))
    assert exploratory(tmp_path / "report") == ["seeds added to those fixed on 2026-01-01 10:00 UTC: 2"]
    assert json.loads((tmp_path / "benchmark.json").read_text())["seeds"] == [0, 1]


def test_every_choice_after_the_fact_is_named(tmp_path: Path) -> None:
    fixed, _ = plan.preregister(plan_of(tmp_path, ("bf16", "nf4", "int8")), ["mmlu", "held_out"])
    kept = {"recipe": fixed.recipe, "margin": 1.0, "precisions": ["bf16", "nf4", "int8"], "seeds": [0, 1]}
    kept["tasks"] = ["held_out", "mmlu"]
    assert departures(fixed, **kept) == []
    when = fixed.time
    for change, told in (
        ({"recipe": "other"}, f"the recipe is other where {fixed.recipe} was fixed on {when} before the first score"),
        ({"precisions": ["bf16", "nf4"]}, f"precisions left out of those fixed on {when}: int8"),
        ({"precisions": [*kept["precisions"], "fp4"]}, f"precisions added to those fixed on {when}: fp4"),
        ({"tasks": ["held_out"]}, f"tasks left out of those fixed on {when}: mmlu"),
        ({"tasks": ["held_out", "mmlu", "gsm8k"]}, f"tasks added to those fixed on {when}: gsm8k"),
    ):
        assert departures(fixed, **kept | change) == [told]


def test_until_the_first_score_a_plan_may_change(
    tmp_path: Path, laboratory: Laboratory, capsys: pytest.CaptureFixture[str]
) -> None:
    laboratory.interrupt_at = 2  # one run is trained
    with pytest.raises(KeyboardInterrupt):
        command.run(plan_of(tmp_path))
    laboratory.interrupt_at = -1
    command.run(plan_of(tmp_path, margin=2.0))
    assert "in place of what was fixed on 2026-01-01 10:00 UTC: nothing is scored yet" in capsys.readouterr().err
    assert exploratory(tmp_path / "report") == []


def test_what_is_fixed_after_a_score_is_exploratory(tmp_path: Path, laboratory: Laboratory) -> None:
    command.run(plan_of(tmp_path))
    (tmp_path / "benchmark.json").unlink()
    command.run(plan_of(tmp_path, margin=2.0))
    told = exploratory(tmp_path / "report")
    assert len(told) == 4 and all("was scored already when the plan was fixed" in one for one in told)


def test_a_trial_gives_way_to_the_whole(tmp_path: Path, laboratory: Laboratory) -> None:
    command.run(plan_of(tmp_path, limit=30))
    assert "NOT A RESULT" in (tmp_path / "report" / "index.html").read_text()
    laboratory.interrupt_at = len(laboratory.done) + 3
    with pytest.raises(KeyboardInterrupt):
        command.run(plan_of(tmp_path))
    laboratory.interrupt_at = -1
    command.run(plan_of(tmp_path))
    assert "NOT A RESULT" not in (tmp_path / "report" / "index.html").read_text()
    with pytest.raises(RunFolderError, match="holds whole results"):
        command.run(plan_of(tmp_path, limit=30))


def test_another_benchmarks_folder_is_refused(tmp_path: Path, laboratory: Laboratory) -> None:
    command.run(plan_of(tmp_path / "b"))
    with pytest.raises(RunFolderError, match=r"is a benchmark with flags \[\]"):
        command.run(plan_of(tmp_path / "b", flags={"max_steps": 5}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="holds other files"):
        command.run(plan_of(tmp_path / "mine"))


def test_a_run_of_other_settings_is_refused(tmp_path: Path, laboratory: Laboratory) -> None:
    command.run(plan_of(tmp_path))
    file = tmp_path / "nf4-seed0" / "run.json"
    content = json.loads(file.read_text())
    content["settings"]["training"]["learning_rate"] = 1.0
    file.write_text(json.dumps(content))
    with pytest.raises(RunFolderError, match=r"trained with settings\.training\.learning_rate 1\.0"):
        command.run(plan_of(tmp_path))


def test_an_unknown_task_is_refused_before_training(tmp_path: Path, laboratory: Laboratory) -> None:
    with pytest.raises(RecipesError, match="standin_choise"):
        command.run(plan_of(tmp_path, tasks=["./standin_choise.yaml"]))
    assert laboratory.done == [] and not (tmp_path / "benchmark.json").exists()


# Training in a process of its own


def fake_recipe(folder: Path, body: str) -> Plan:
    plan = plan_of(folder / "b")
    script = folder / "recipe.py"
    script.write_text(body)
    plan.output.mkdir()
    return Plan(**{**vars(plan), "recipe_file": script})


def quiet() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def test_an_unfinished_run_goes_on(tmp_path: Path) -> None:
    write = (
        "import os, sys, pathlib, json\nfolder = pathlib.Path(sys.orig_argv[sys.orig_argv.index('--output_dir') + 1])\n"
    )
    write += "folder.mkdir(exist_ok=True)\n(folder / 'run.json').write_text(json.dumps(sys.orig_argv))\nos._exit(0)\n"
    plan = fake_recipe(tmp_path, write)
    for name, file in (("nf4-seed0", "started.json"), ("bf16-seed1", ".started.json.123")):
        (plan.output / name).mkdir()
        (plan.output / name / file).write_text("")
    training.train_missing(plan, quiet())
    words = {arm.name: json.loads((arm.folder.path / "run.json").read_text()) for arm in plan.arms}
    chosen = {name: {"--resume", "--overwrite"} & set(given) for name, given in words.items()}
    assert chosen == {
        "bf16, seed 0": set(),
        "nf4, seed 0": {"--resume"},
        "bf16, seed 1": set(),  # killed before it had said what it is: the folder is free
        "nf4, seed 1": set(),
    }


@pytest.mark.parametrize("ending", ["", "Llama2Guanaco.main()"], ids=["never calls main", "calls main"])
def test_an_unfinished_run_of_other_settings_is_refused_and_kept(tmp_path: Path, ending: str) -> None:
    file = tmp_path / "llama2_guanaco.py"
    file.write_text(RECIPE.read_text().partition("if __name__")[0] + ending)
    plan = replace(plan_of(tmp_path / "b", seeds=[0]), recipe_file=file)
    folder = plan.arms[0].folder
    folder.path.mkdir(parents=True)
    run = settings_identity(plan.arms[0].settings)
    run["training"]["learning_rate"] = 1.0
    started = {"started": "2026", "run": run, "versions": {}, "resumes": []}
    folder.started.write_text(json.dumps(started))
    with pytest.raises(CheckError) as caught:
        training.train_missing(plan, quiet())
    assert "holds another run" in str(caught.value)
    assert "training.learning_rate: was 1.0" in str(caught.value)
    assert f"To train this run anew, remove {folder.path}" in str(caught.value)
    assert json.loads(folder.started.read_text()) == started


def test_a_training_that_fails_says_its_last_words(tmp_path: Path) -> None:
    plan = fake_recipe(tmp_path, "print('error: the disk is full'); raise SystemExit(2)")
    with pytest.raises(
        CheckError, match=r"training bf16, seed 0 ended with exit code 2(.*\n)*  error: the disk is full"
    ):
        training.train_missing(plan, quiet())


TRAINING = """
import os, sys
if "--output_dir" in sys.orig_argv:  # the file trains
    import time
    from pathlib import Path
    from qlora_recipes.run.signals import StopSignals

    folder = Path(sys.orig_argv[sys.orig_argv.index("--output_dir") + 1])
    folder.mkdir(parents=True)
    with StopSignals() as signals:
        signals.loop_runs = True
        (folder / "started.json").touch()
        while signals.received is None:
            time.sleep(0.01)
        (folder / "signalled").touch()
        time.sleep({step})
        (folder / "saved").touch()
        os._exit(128 + signals.received)
"""


@contextmanager
def benchmark_that_trains(folder: Path, step: float) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Start the script on a recipe whose training waits for a signal, and yield it when that is what it does."""
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.read_text().split("if __name__")[0] + TRAINING.format(step=step))
    words = [sys.executable, str(ROOT / "eval" / "benchmark.py"), str(recipe), "--precisions", "nf4", "bf16"]
    words += ["--output", str(folder / "b")]
    run = folder / "b" / "bf16-seed0"
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(run / "started.json")
        yield process, run


def wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"there is no {file}")


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_training_save_and_ends_both(tmp_path: Path, which: signal.Signals, code: int) -> None:
    with benchmark_that_trains(tmp_path, step=1.0) as (process, run):
        os.killpg(process.pid, which)  # as a terminal does
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert (run / "saved").exists()
    assert f"stopped by {which.name}: 0 of 2 runs are trained; the same command resumes" in said
    assert "Traceback" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_second_signal_ends_both_at_once(tmp_path: Path) -> None:
    with benchmark_that_trains(tmp_path, step=30.0) as (process, run):
        process.send_signal(signal.SIGTERM)
        wait_for(run / "signalled")
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    assert not (run / "saved").exists()


def test_a_training_behind_a_launcher_is_waited_for(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING.format(step=1.0))
    run = tmp_path / "run"
    words = [sys.executable, str(script), "--output_dir", str(run)]
    launcher = [
        sys.executable,
        "-c",
        f"import subprocess; subprocess.run({words!r})",
    ]  # as accelerate's for one process
    process = subprocess.Popen(launcher, start_new_session=True)
    wait_for(run / "started.json")
    stop({process: True})
    process.wait()
    assert (run / "saved").exists()


def test_a_training_that_was_stopped_itself_ends_the_benchmark_so(tmp_path: Path) -> None:
    plan = fake_recipe(tmp_path, "import os; os._exit(143)")
    with pytest.raises(Stopped) as stopped:
        training.train_missing(plan, quiet())
    assert stopped.value.code == 143


def test_the_script_answers_at_once() -> None:
    words = [sys.executable, str(ROOT / "eval" / "benchmark.py"), str(RECIPE), "--precisions", "nf4"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --precisions: got nf4, expected two or more")
