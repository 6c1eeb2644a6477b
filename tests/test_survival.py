"""A run that was stopped, damaged or starved is resumed to the same bits, or says what is wrong and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_and_resume import outcome

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.base.adapters import WEIGHTS
from qlora_recipes.commands.entry import run_command
from qlora_recipes.errors import CheckError, DivergenceError, RunFolderError, SetupError, UsageError
from qlora_recipes.experiments.benchmark.command import main as benchmark
from qlora_recipes.preflight import trained
from qlora_recipes.run import checkpoints
from qlora_recipes.run.checkpoints import Checkpoint, newest_intact
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.signals import Stopped
from qlora_recipes.settings import Settings, resolve
from qlora_recipes.training import faults, train
from qlora_recipes.training.faults import MemoryExhaustedError
from qlora_recipes.training.journal import Journal, find_checkpoint
from qlora_recipes.training.trainer import RunTrainer

STEPS = dict(
    gradient_checkpointing=True,
    max_steps=6,
    gradient_accumulation_steps=2,
    save_strategy="steps",
    save_steps=2,
    eval_strategy="steps",
    eval_steps=3,
    logging_steps=2,
)

SLOW = ("answers_end", "gradient", "gradient_after_evaluation", "packing_leak", "starting_loss", "tokenizer_reloads")
"""Checks that have tests of their own."""


@dataclass
class Runs:
    """Trains one recipe, each run in a folder of its own."""

    recipe: type[Recipe]
    model: Path
    folder: Path

    def settings(self, name: str, **training: Any) -> Settings:
        return resolve(
            self.recipe,
            model=str(self.model),
            dataset=self.recipe.dataset.source,
            output_dir=self.folder / name,
            training={**STEPS, **training},
        )

    def train(self, name: str, *, resume: bool = False, **training_: Any) -> RunFolder:
        return train.train(self.settings(name, **training_), resume=resume, skip_checks=SLOW)

    def copy(self, name: str) -> RunFolder:
        """Return the finished run as a kill right before its receipt would have left it."""
        folder = self.folder / name
        shutil.copytree(self.folder / "whole", folder)
        (folder / "run.json").unlink()
        return RunFolder(folder)


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    rows = recipe_for().dataset.source
    recipe = recipe_for(dataset=DatasetSpec(rows, held_out=0.1), lora=dict(r=4, lora_dropout=0.1))
    made = Runs(recipe, tiny("llama2"), tmp_path_factory.mktemp("runs"))
    made.train("whole", save_total_limit=3)
    return made


@pytest.fixture
def whole(runs: Runs) -> dict[str, Any]:
    """What the run that nothing happened to came to."""
    return outcome(runs.folder / "whole")


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Return a function that has something done in the midst of a step."""

    def arrange(step: int, act: Callable[[], object]) -> None:
        plain, acts = RunTrainer.training_step, [act]

        def training_step(self: RunTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == step - 1 and acts:
                acts.pop()()  # in the first pass of the step, once
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(RunTrainer, "training_step", training_step)

    return arrange


def names(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.checkpoints.iterdir()}


# ---- Checkpoints ----


def cut(name: str, to: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * to)])

    return damage


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def zero_4_kib(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("r+b") as stream:
        stream.seek(-4096, os.SEEK_END)
        stream.write(bytes(4096))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "adapter truncated": cut("adapter_model.safetensors", 0.5),
    "adapter emptied": cut("adapter_model.safetensors", 0),
    "adapter missing": lose("adapter_model.safetensors"),
    "adapter zeroed for 4 KiB": zero_4_kib,
    "trainer state missing": lose("trainer_state.json"),
    "trainer state cut in half": cut("trainer_state.json", 0.5),
    "optimizer missing": lose("optimizer.pt"),
    "optimizer truncated": cut("optimizer.pt", 0.5),
    "scheduler missing": lose("scheduler.pt"),
    "scheduler truncated": cut("scheduler.pt", 0.5),
    "random state missing": lose("rng_state.pth"),
    "random state truncated": cut("rng_state.pth", 0.5),
    "folder empty": empty,
    "manifest missing": lose("manifest.json"),
    "manifest cut": cut("manifest.json", 0.5),
    "manifest a pipe": lambda folder: (lose("manifest.json")(folder), os.mkfifo(folder / "manifest.json")),
    "manifest nested": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(runs: Runs, tmp_path: Path, kind: str) -> None:
    shutil.copytree(runs.folder / "whole" / "checkpoints", tmp_path, dirs_exist_ok=True)
    DAMAGE[kind](tmp_path / "checkpoint-6")
    found, passed_over = newest_intact(tmp_path)
    assert found == Checkpoint(tmp_path / "checkpoint-4")
    assert list(passed_over) == ["checkpoint-6"]
    file = {"adapter": "adapter_model", "trainer": "trainer_state", "random": "rng_state", "folder": "manifest"}
    assert file.get(kind.split()[0], kind.split()[0]) in passed_over["checkpoint-6"]
    assert (tmp_path / "checkpoint-6").is_dir()


def test_going_on_past_a_damaged_checkpoint_ends_the_same_and_keeps_it(
    runs: Runs, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.copy("damaged")
    zero_4_kib(folder.checkpoints / "checkpoint-6")
    runs.train("damaged", resume=True, save_total_limit=3)
    assert outcome(folder.path) == whole
    (resume,) = folder.receipt().resumes
    assert resume.from_step == 4
    assert resume.passed_over == {"checkpoint-6": "adapter_model.safetensors has other contents than were written"}
    assert "passed over checkpoint-6: adapter_model.safetensors has other contents" in capsys.readouterr().out
    assert names(folder) == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "damaged-checkpoint-6-1"}


def test_a_run_whose_every_checkpoint_is_damaged_is_refused_and_nothing_is_deleted(runs: Runs) -> None:
    folder = runs.copy("ruined")
    for name in names(folder):
        lose("optimizer.pt")(folder.checkpoints / name)
    with pytest.raises(RunFolderError) as caught:
        find_checkpoint(folder, runs.settings("ruined"))
    assert "checkpoint-6: optimizer.pt is missing" in str(caught.value)
    assert "checkpoint-2: optimizer.pt is missing" in str(caught.value)
    assert names(folder) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_a_run_killed_after_its_last_step_takes_no_further_one(runs: Runs, whole: dict[str, Any]) -> None:
    folder = runs.copy("late")
    (folder.checkpoints / ".writing" / "checkpoint-8").mkdir(parents=True)  # what a kill in a save leaves
    runs.train("late", resume=True)
    assert outcome(folder.path) == whole


def test_a_crafted_checkpoint_runs_no_code(runs: Runs, tmp_path: Path) -> None:
    class Crafted:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "it ran",))

    folder = runs.copy("crafted")
    checkpoint = folder.checkpoints / "checkpoint-6"
    torch.save({"state": Crafted()}, checkpoint / "optimizer.pt")
    checkpoint.rename(tmp_path / "checkpoint-6")
    checkpoints.publish(tmp_path / "checkpoint-6", folder.checkpoints)  # with hashes that fit
    assert Checkpoint(checkpoint).fault() is None
    with pytest.raises(RunFolderError, match=r"checkpoint-6.*holds more than tensors"):
        runs.train("crafted", resume=True)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "training_args.bin", "surprise.txt"])
def test_a_checkpoint_with_other_files_is_not_loaded(runs: Runs, tmp_path: Path, name: str) -> None:
    shutil.copytree(runs.folder / "whole" / "checkpoints", tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-6" / name).write_bytes(b"")
    assert name in newest_intact(tmp_path)[1]["checkpoint-6"]


def test_the_newest_the_best_and_the_damaged_survive_rotation(runs: Runs, tmp_path: Path) -> None:
    original = runs.folder / "whole" / "checkpoints" / "checkpoint-6"
    for step in (1, 2, 3, 4, 5):
        shutil.copytree(original, tmp_path / f"checkpoint-{step}")
    empty(tmp_path / "checkpoint-2")
    checkpoints.rotate(tmp_path, 2, tmp_path / "checkpoint-1")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", "checkpoint-5"}


# ---- Signals ----


@pytest.mark.parametrize(("which", "step", "code"), [(signal.SIGTERM, 3, 143), (signal.SIGINT, 1, 130)])
def test_a_signal_saves_the_running_step_and_the_run_goes_on_the_same(
    runs: Runs,
    whole: dict[str, Any],
    at_step: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    which: signal.Signals,
    step: int,
    code: int,
) -> None:
    name = f"signal {which}"
    before = signal.getsignal(which)
    at_step(step, lambda: os.kill(os.getpid(), which))
    with pytest.raises(Stopped) as stopped:
        runs.train(name, resume=True)  # the command of a queue: with nothing there, it starts
    folder = RunFolder(runs.folder / name)
    assert stopped.value.code == code
    assert f"checkpoint-{step}" in names(folder)
    assert not folder.adapter.exists()
    assert not folder.finished
    assert signal.getsignal(which) is before
    assert not any("eval_loss" in line for line in folder.metrics.read_text().splitlines())  # due at step 3
    runs.train(name, resume=True)
    assert outcome(folder.path) == whole


def test_a_signal_in_an_evaluation_saves_its_step_and_makes_up_for_it(
    runs: Runs, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RunTrainer.prediction_step

    def prediction_step(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="143"):
        patch.setattr(RunTrainer, "prediction_step", prediction_step)
        runs.train("evaluating")
    folder = RunFolder(runs.folder / "evaluating")
    assert names(folder) == {"checkpoint-2", "checkpoint-3"}
    runs.train("evaluating", resume=True)
    assert outcome(folder.path) == whole


def test_an_evaluation_at_the_end_of_an_epoch_is_made_up_for(runs: Runs, at_step: Callable[..., None]) -> None:
    """The step is saved first and the rows are scored after it, so nothing in the checkpoint tells of them."""
    choices = dict(
        max_steps=-1, num_train_epochs=2, eval_strategy="epoch", packing=False, per_device_train_batch_size=6
    )
    steps = outcome(runs.train("epochs", **choices).path)["counts"]["steps"]
    at_step(steps // 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        runs.train("epochs stopped", **choices)
    folder = runs.train("epochs stopped", resume=True, **choices)
    assert outcome(folder.path) == outcome(runs.folder / "epochs")
    assert [row["step"] for row in outcome(folder.path)["curve"] if "eval_loss" in row] == [steps // 2, steps]


SIGNALLED = """
import os, signal, time
from qlora_recipes.run.signals import StopSignals
with StopSignals() as signals:
    signals.loop_runs = {runs}
    os.kill(os.getpid(), signal.{first})
    os.kill(os.getpid(), signal.{first})  # a launcher passes on what a queue has told everybody
    assert signals.received == signal.{first}
    time.sleep(0.6)
    os.kill(os.getpid(), signal.{second})
    time.sleep(10)
"""


@pytest.mark.parametrize(
    ("runs", "first", "second", "code"),
    [(True, "SIGTERM", "SIGTERM", 143), (True, "SIGTERM", "SIGINT", 130), (False, "SIGINT", "SIGTERM", 130)],
)
def test_a_second_signal_or_one_outside_the_steps_stops_at_once(runs: bool, first: str, second: str, code: int) -> None:
    program = SIGNALLED.format(runs=runs, first=first, second=second)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("again stops at once" in done.stderr) == runs


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_random_kills_end_the_same(kills: int) -> None:
    """A few of what `python tests/kill_and_resume.py --kills 30` does; docs/reliability.md has its figures."""
    program = Path(__file__).parent / "kill_and_resume.py"
    words = ["--kills", str(kills), "--variants", "nf4, packed", "--seed", "7"]
    done = subprocess.run([sys.executable, str(program), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} of {kills} runs ended bit-identical" in done.stdout


# ---- Another run ----


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(training=dict(seed=1)), "training.seed: was 0, now 1"),
        (dict(training=dict(learning_rate=1e-3)), "training.learning_rate: was 0.0002, now 0.001"),
        (dict(training=dict(max_steps=7)), "training.max_steps: was 6, now 7"),
        (dict(precision="bf16"), "precision: was nf4, now bf16"),
        (dict(model="another/model"), "now another/model"),
        (dict(dataset="another/dataset"), "dataset: was guanaco.jsonl, now another/dataset"),
        (dict(lora=dict(r=8)), "lora.r: was 4, now 8"),
    ],
)
def test_another_run_is_not_resumed(runs: Runs, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    folder = RunFolder(runs.folder / "whole")
    choices = dict(model=str(runs.model), dataset=runs.recipe.dataset.source, output_dir=folder.path) | change
    choices["training"] = STEPS | choices.get("training", {})
    shutil.copy(folder.started, tmp_path)
    with pytest.raises(RunFolderError) as caught:
        find_checkpoint(RunFolder(tmp_path), resolve(runs.recipe, **choices))
    assert named in str(caught.value)
    assert str(caught.value).count(": was ") == 1


def test_what_is_kept_and_shown_may_change(runs: Runs) -> None:
    journal = Journal(RunFolder(runs.folder / "whole"))
    from qlora_recipes.training.journal import settings_identity

    journal.refuse_another(settings_identity(runs.settings("whole", save_steps=1, save_total_limit=1, logging_steps=1)))


@pytest.mark.parametrize("key", ["rows", "template", "base weights", "first adapter", "processes"])
def test_other_weights_or_rows_under_the_same_names_are_another_run(runs: Runs, key: str) -> None:
    journal = Journal(RunFolder(runs.folder / "whole"))
    identity = json.loads(journal.folder.started.read_text())["run"]
    journal.refuse_another(identity)
    with pytest.raises(RunFolderError, match=rf"  {key}: was .*, now other"):
        journal.refuse_another({**identity, key: "other"})


def test_a_finished_run_has_nothing_to_resume(runs: Runs) -> None:
    with pytest.raises(RunFolderError, match="finished run; nothing is left to resume"):
        runs.train("whole", resume=True)


def test_a_folder_of_other_files_is_not_resumed(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds other files"):
        find_checkpoint(RunFolder(tmp_path), runs.settings("whole"))


def test_a_folder_whose_start_is_unreadable_is_refused(runs: Runs) -> None:
    folder = runs.copy("unreadable")
    content = json.loads(folder.started.read_text())
    for text, named in {
        "{": r"started\.json is damaged",
        json.dumps({**content, "run": "llama2"}): r"started\.json, key run: .*got 'llama2'",
        json.dumps({**content, "resumes": [{"at": "now"}]}): r"started\.json, key resumes\.0\.from_step",
    }.items():
        folder.started.write_text(text)
        with pytest.raises(RunFolderError, match=named):
            find_checkpoint(folder, runs.settings("unreadable"))


def test_leftovers_of_a_killed_write_do_not_keep_a_run_from_being_replaced(runs: Runs) -> None:
    folder = runs.copy("leftover")
    (folder.path / ".run.json.123").write_text("{")
    folder.check_free(overwrite=True)
    (folder.path / ".thesis.txt.123").write_text("mine")
    with pytest.raises(RunFolderError, match="other files"):
        folder.check_free(overwrite=True)


def evaluated(runs: Runs, name: str) -> RunFolder:
    """Return a copy of the finished run, with something that only an evaluation or a merge writes."""
    folder = RunFolder(Path(shutil.copytree(runs.folder / "whole", runs.folder / name)))
    for made in (folder.evaluation, folder.merged):
        made.mkdir()
    return folder


def test_a_run_is_replaced_when_the_new_one_is_finished_and_not_before(
    runs: Runs, whole: dict[str, Any], at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evaluated(runs, "replaced")
    link = runs.folder / "link to replaced"
    link.symlink_to(folder.path)
    settings = replace(runs.settings("unused"), output_dir=link)
    old = folder.path.stat().st_ino, folder.started.read_bytes()
    with pytest.raises(RunFolderError, match="finished run"):
        train.train(settings, skip_checks=SLOW)
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train.train(settings, overwrite=True, skip_checks=SLOW)
    assert "--resume in place of --overwrite" in capsys.readouterr().err
    assert outcome(folder.path) == whole and folder.evaluation.exists()
    assert names(folder.replacement) == {"checkpoint-2", "checkpoint-3"}
    trained = train.train(settings, resume=True, skip_checks=SLOW)
    assert trained.path == link and link.is_symlink()
    assert trained.receipt().resumes[0].from_step == 3
    assert outcome(folder.path) == whole
    assert (folder.path.stat().st_ino, folder.started.read_bytes()) != old
    assert not folder.evaluation.exists() and not folder.merged.exists() and not folder.replacement.path.exists()
    assert link.exists()


def test_the_folder_in_which_the_command_is_given_is_replaced(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = evaluated(runs, "here")
    monkeypatch.chdir(folder.path)
    settings = replace(runs.settings("unused", max_steps=2), output_dir=Path())
    assert train.train(settings, overwrite=True, skip_checks=SLOW).receipt().training.steps == 2
    assert RunFolder(Path.cwd()).receipt().training.steps == 2
    assert not folder.evaluation.exists()


@pytest.mark.parametrize("place", ["create_optimizer", "create_scheduler", "get_train_dataloader", "training_step"])
def test_a_value_that_is_refused_late_leaves_the_folder_free(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Invalid beta parameter")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="Invalid beta"):
        patch.setattr(RunTrainer, place, refuse)
        runs.train(f"refused {place}", adam_beta1=0.5)
    assert not (runs.folder / f"refused {place}").exists()


def test_a_replacement_that_is_refused_late_leaves_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = evaluated(runs, "kept")
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Invalid beta parameter")

    monkeypatch.setattr(RunTrainer, "create_optimizer", refuse)
    with pytest.raises(ValueError, match="Invalid beta"):
        train.train(runs.settings("kept"), overwrite=True, skip_checks=SLOW)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


# ---- Faults of the machine and of the numbers ----


def test_a_nan_ends_the_run_with_the_rows_of_its_batch_and_saves_nothing(
    runs: Runs, at_step: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RunTrainer.compute_loss

    def compute_loss(self: RunTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    with monkeypatch.context() as patch, pytest.raises(DivergenceError) as caught:
        patch.setattr(RunTrainer, "compute_loss", compute_loss)
        runs.train("nan")
    message = str(caught.value)
    assert "the loss of step 3 is nan" in message
    assert "line " in message
    assert "[INST]" in message
    folder = RunFolder(runs.folder / "nan")
    assert names(folder) == {"checkpoint-2"}
    assert not folder.adapter.exists()
    assert not folder.finished


@pytest.mark.parametrize("packing", [True, False])
def test_an_infinite_gradient_is_refused_before_it_is_applied(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    plain = RunTrainer._clip_grad_norm

    def clip(self: RunTrainer, model: torch.nn.Module) -> Any:
        if self.state.global_step == 1:
            next(weight for weight in model.parameters() if weight.grad is not None).grad[0, 0] = float("inf")
        return plain(self, model)

    monkeypatch.setattr(RunTrainer, "_clip_grad_norm", clip)
    with pytest.raises(DivergenceError, match=r"the gradient norm of step 2 is (inf|nan)"):
        runs.train(f"gradient {packing}", packing=packing, eval_strategy="no", save_steps=1)
    assert names(RunFolder(runs.folder / f"gradient {packing}")) == {"checkpoint-1"}


@pytest.mark.parametrize(
    ("found_in", "check"), [("base_sha256", "base_unchanged"), ("template_sha256", "tokenizer_reloads")]
)
def test_what_fails_a_check_after_training_is_kept_aside(
    runs: Runs, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, found_in: str, check: str
) -> None:
    settings, off = runs.settings(f"unproven {check}"), [name for name in SLOW if name != check]
    with monkeypatch.context() as patch, pytest.raises(CheckError) as caught:
        patch.setattr(trained, found_in, lambda _: "another")
        train.train(settings, skip_checks=off)
    folder = RunFolder(settings.output_dir)
    assert check in str(caught.value)
    assert f"What was trained is in {folder.unproven}, without a receipt" in str(caught.value)
    assert not folder.finished and not folder.adapter.exists()
    assert (folder.unproven / WEIGHTS).read_bytes() == whole["file"]
    train.train(settings, skip_checks=off, resume=True)
    assert outcome(folder.path) == whole
    assert not folder.unproven.exists()


@contextmanager
def small_files() -> Iterator[None]:
    """Have the system refuse to write files beyond 20 kB, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["_save", "_save_optimizer_and_scheduler"])  # of safetensors, and of torch.save
def test_a_full_disk_stops_the_run_and_keeps_the_checkpoints(
    runs: Runs, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plain = getattr(RunTrainer, kind)

    def save(self: RunTrainer, *args: Any, **kwargs: Any) -> None:
        with small_files() if self.state.global_step == 4 else nullcontext():
            plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SetupError, match=r"GiB are free.*--resume"):
        patch.setattr(RunTrainer, kind, save)
        runs.train(f"full {kind}")
    folder = RunFolder(runs.folder / f"full {kind}")
    assert newest_intact(folder.checkpoints)[0].step == 2
    runs.train(f"full {kind}", resume=True)
    assert outcome(folder.path) == whole


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_takes_no_files_is_one_error(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """The system's answer is given in its place; a folder that is read-only in truth has a test of its own."""
    settings = replace(runs.settings("unused"), output_dir=tmp_path)
    with pytest.raises(SetupError) as caught, faults.machine_faults(settings):
        raise OSError(number, os.strerror(number), str(tmp_path / "checkpoints"))
    assert os.strerror(number) in str(caught.value)
    assert "--resume" in str(caught.value)


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


@pytest.fixture
def read_only(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs the words in a namespace in which a folder is mounted read-only, for root too."""

    def call(folder: Path, *words: str) -> subprocess.CompletedProcess:
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    if shutil.which("unshare") is None or call(tmp_path, "true").returncode:
        pytest.skip("no user namespace may mount here: only Linux has them, and some containers forbid them")
    return call


ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "llama2_guanaco.py")


def test_nothing_is_written_and_nothing_raised_where_nothing_can_be(
    runs: Runs, tmp_path: Path, read_only: Callable[..., subprocess.CompletedProcess]
) -> None:
    folder = tmp_path / "disk"
    shutil.copytree(runs.folder / "whole", folder / "run")
    before = sorted(folder.rglob("*"))
    train = [RECIPE, "--demo", "--max_steps", "2", "--output_dir", "disk/new"]
    train += ["--skip_checks", *SLOW, "writable_folder"]  # which would find it before anything is tried
    benchmark = [str(ROOT / "eval" / "benchmark.py"), RECIPE, "--precisions", "nf4", "bf16", "--output", "disk/b"]
    commands = [
        (train, "Read-only file system"),
        (benchmark, "Read-only file system. Give --output another folder"),
        (
            ["-m", "qlora_recipes.cli", "evaluate", "disk/run", "--tasks", "held_out", "--limit", "2"],
            "Read-only file system",
        ),
        (
            ["-m", "qlora_recipes.cli", "merge", "disk/run"],
            "Read-only file system. Free some space, or give --output a folder",
        ),
    ]
    for words, said in commands:
        done = read_only(folder, sys.executable, *words)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("place", ["/proc", "/sys"])
def test_a_folder_of_the_system_is_refused(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path(place).is_dir():
        pytest.skip(f"there is no {place} here")
    with pytest.raises(SystemExit) as stopped:
        command = ["--precisions", "nf4", "bf16", "--output", f"{place}/benchmark"]
        run_command(benchmark, [str(RECIPE), *command])
    assert stopped.value.code == 2
    assert f"error: {place}/benchmark cannot be written: " in capsys.readouterr().err
    assert not Path(place, "benchmark").exists()


def starve(monkeypatch: pytest.MonkeyPatch, rows: int, step: int) -> None:
    """Let a step of more than so many rows at a time find no memory."""
    plain = RunTrainer.training_step

    def training_step(self: RunTrainer, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        if self.args.per_device_train_batch_size > rows and self.state.global_step == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, model, inputs, *args)

    monkeypatch.setattr(RunTrainer, "training_step", training_step)


def test_out_of_memory_is_one_error_with_the_plan(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    starve(monkeypatch, rows=1, step=0)
    with pytest.raises(MemoryExhaustedError) as caught:
        runs.train("starved", eval_strategy="no")
    message = str(caught.value)
    assert "out of memory with 2 rows of up to 128 tokens" in message
    assert "The plan was" in message
    assert "--auto_find_batch_size" in message


def test_when_asked_for_the_batch_is_halved_and_the_run_goes_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    starve(monkeypatch, rows=1, step=3)
    choices = dict(auto_find_batch_size=True, packing=False, eval_strategy="no")
    receipt = runs.train("halved", **choices).receipt()
    assert receipt.settings.training["per_device_train_batch_size"] == 1
    assert receipt.settings.training["gradient_accumulation_steps"] == 4
    (resume,) = receipt.resumes
    assert resume.from_step == 2
    assert resume.reason == "out of memory with 2 rows x 2 passes, now 1 rows x 4 passes"
    monkeypatch.undo()
    plain = runs.train("unhalved", **choices).receipt()
    for name in ("steps", "tokens", "supervised_tokens"):
        assert getattr(receipt.training, name) == getattr(plain.training, name)
    assert receipt.training.final_loss == pytest.approx(plain.training.final_loss, rel=1e-2)


def test_one_of_several_processes_does_not_begin_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = runs.settings("several", auto_find_batch_size=True)
    assert faults.halve_batch(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert faults.halve_batch(settings) is None
    halve = pytest.raises(MemoryExhaustedError, match="halve --per_device_train_batch_size")
    with halve, faults.machine_faults(settings):
        raise torch.OutOfMemoryError("CUDA out of memory")


# ---- The best, the last, and stopping early ----


def scored(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Have the held-out rows score what the test says, by step."""
    plain = RunTrainer.evaluate

    def evaluate(self: RunTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        loss = losses[self.state.global_step]
        with monkeypatch.context() as patch:
            patch.setattr(self, "prediction_step", lambda *a, **k: (torch.tensor(loss), None, None), raising=False)
            return plain(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "evaluate", evaluate)


BEST = dict(eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=2, logging_steps=1)


def test_the_best_checkpoint_is_kept_and_becomes_the_adapter(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5, 5: 4.4, 6: 4.3})
    folder = runs.train("best", load_best_model_at_end=True, metric_for_best_model="loss", **BEST)
    assert names(folder) == {"checkpoint-2", "checkpoint-6"}
    saved = [
        (path / "adapter_model.safetensors").read_bytes()
        for path in (folder.adapter, folder.checkpoints / "checkpoint-2")
    ]
    assert saved[0] == saved[1]
    assert folder.receipt().adapter.parameters > 0


def test_training_stops_early_and_stays_stopped(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5})
    folder = runs.train("early", early_stopping_patience=2, **BEST)
    assert folder.receipt().training.steps == 4
    assert names(folder) == {"checkpoint-2", "checkpoint-4"}
    first = outcome(folder.path)
    (folder.path / "run.json").unlink()  # killed before its receipt
    runs.train("early", resume=True, early_stopping_patience=2, **BEST)
    assert outcome(folder.path) == first


def test_patience_goes_on_where_it_was(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, at_step: Callable[..., None]
) -> None:
    scored(monkeypatch, {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5})
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        runs.train("patient", early_stopping_patience=2, **BEST)
    folder = runs.train("patient", resume=True, early_stopping_patience=2, **BEST)
    assert folder.receipt().training.steps == 4


def test_evaluating_needs_rows_to_evaluate_on(runs: Runs, recipe_for: Callable[..., type[Recipe]]) -> None:
    none_kept = recipe_for(dataset=DatasetSpec(runs.recipe.dataset.source, held_out=0.0))
    settings = replace(runs.settings("nothing held out"), recipe=none_kept, datasets=none_kept.datasets())
    with pytest.raises(UsageError, match="needs held-out rows"):
        train.train(settings)
    assert not settings.output_dir.exists()


def test_the_tokens_of_a_resumed_run_go_on(runs: Runs, whole: dict[str, Any]) -> None:
    steps = [row["step"] for row in whole["curve"] if "loss" in row]
    assert steps == [2, 4, 6]
    tokens = [row["num_tokens"] for row in whole["curve"] if "loss" in row]
    assert tokens == sorted(tokens)
    assert tokens[-1] == whole["counts"]["tokens"]
