"""A run that another number of processes resumes: the same rows in every step, everything counted, and it is said."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import PartialState
from forked import in_processes
from kill_and_resume import outcome
from transformers import TrainerState
from trl import SFTTrainer

from qlora_recipes import DatasetSpec, Recipe, preflight
from qlora_recipes.errors import RunFolderError, UsageError
from qlora_recipes.report.card import model_card
from qlora_recipes.run.checkpoints import WRITING
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import Settings, resolve
from qlora_recipes.training.journal import Journal, find_checkpoint, restore_batch, settings_identity
from qlora_recipes.training.token_count import TokenCount
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import RunTrainer

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("5.17"), reason="resumes ranks on cpu:0, which torch.load does not know"
)
ROWS, BATCH = 16, 4
STEPS = dict(
    max_steps=8, num_train_epochs=2, packing=False, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    save_strategy="steps", save_steps=3, save_total_limit=3, logging_steps=1,
)  # fmt: skip


@dataclass
class Runs:
    """Trains one recipe on two epochs of sixteen rows, and writes down which rows every step had."""

    recipe: type[Recipe]
    model: Path
    folder: Path

    def settings(self, name: str, **training: Any) -> Settings:
        return resolve(
            self.recipe,
            model=str(self.model),
            dataset=self.recipe.dataset.source,
            precision="bf16",
            output_dir=self.folder / name,
            training={**STEPS, **training},
        )

    def train(self, name: str, rank: int = 0, **training: Any) -> None:
        plain, rows = RunTrainer.training_step, self.folder / f"{name}-{rank}.jsonl"

        def training_step(trainer: RunTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with rows.open("a") as file:
                (ids,), (positions,) = inputs["input_ids"], inputs["position_ids"]  # side by side, without padding
                begins = (positions == 0).nonzero().flatten().tolist()
                for begin, end in pairwise([*begins, len(ids)]):
                    file.write(json.dumps([trainer.state.global_step, str(ids[begin:end].tolist())]) + "\n")
            return plain(trainer, model, inputs, *args, **kwargs)

        RunTrainer.training_step = training_step
        try:
            train(self.settings(name, **training), resume=True, skip_checks=preflight.names(self.recipe))
        finally:
            RunTrainer.training_step = plain

    def interrupted(self, name: str, copy: str) -> None:
        """Copy a finished run as a kill between step 3 and step 6 would have left it."""
        shutil.copytree(self.folder / name, self.folder / copy)
        for step in (6, 8):
            shutil.rmtree(self.folder / copy / "checkpoints" / f"checkpoint-{step}")
        (self.folder / copy / "run.json").unlink()

    def rows(self, name: str) -> dict[int, Counter[str]]:
        """Each step to its rows, over all processes."""
        found: dict[int, Counter[str]] = {}
        for file in self.folder.glob(f"{name}-[01].jsonl"):
            for step, row in map(json.loads, file.read_text().splitlines()):
                found.setdefault(step, Counter())[row] += 1
        return found


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    folder = tmp_path_factory.mktemp("processes")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(Path(recipe_for().dataset.source).read_text().splitlines(keepends=True)[:ROWS]))
    made = Runs(recipe_for(dataset=DatasetSpec(str(rows), held_out=0)), tiny("llama2"), folder)
    made.train("one")
    made.interrupted("one", "one-two")

    def two(rank: int) -> None:
        made.train("two", rank, gradient_accumulation_steps=1)
        made.train("one-two", rank)

    in_processes(2, two, folder / "log.txt")
    made.interrupted("two", "two-one")
    made.train("two-one", gradient_accumulation_steps=1)
    return made


@pytest.mark.parametrize(("resumed", "change", "divided"), [("one-two", "1 -> 2", 1), ("two-one", "2 -> 1", 2)])
def test_another_number_of_processes_goes_on_with_the_same_rows(
    runs: Runs, resumed: str, change: str, divided: int
) -> None:
    was, got = RunFolder(runs.folder / resumed[:3]).receipt(), RunFolder(runs.folder / resumed).receipt()
    (resume,) = got.resumes
    assert (resume.from_step, resume.processes_changed) == (3, change)
    assert got.settings.training["gradient_accumulation_steps"] == divided
    for name in ("steps", "micro_batches", "tokens", "supervised_tokens", "padding_share"):
        assert getattr(got.training, name) == pytest.approx(getattr(was.training, name)), name
    assert got.training.seconds > 0
    assert (got.spread.processes, got.spread.nodes, len(got.spread.peak_bytes)) == (2 // divided, 1, 2 // divided)
    assert (got.spread.wrapper, got.spread.sharding) == ("DDP" if divided == 1 else "none", "none")
    assert got.spread.dtypes == {"autocast": "bf16"}
    losses, before = ([row["loss"] for row in outcome(runs.folder / run)["curve"] if "loss" in row]
                      for run in (resumed, resumed[:3]))  # fmt: skip
    assert losses == pytest.approx(before, abs=2e-3)
    assert f"| processes | {change} after step 3" in " ".join(model_card(got).split())


def test_every_step_has_the_same_rows_and_every_row_comes_once_an_epoch(runs: Runs) -> None:
    steps = runs.rows("one")
    assert sorted(steps) == list(range(8)) and {rows.total() for rows in steps.values()} == {BATCH}
    assert runs.rows("two") == steps
    for resumed in ("one-two", "two-one"):
        assert runs.rows(resumed) == {step: rows for step, rows in steps.items() if step >= 3}
    for epoch in (range(4), range(4, 8)):
        rows = sum((steps[step] for step in epoch), Counter())
        assert len(rows) == ROWS and set(rows.values()) == {1}
    assert [steps[step] for step in range(4)] != [steps[step] for step in range(4, 8)]


def test_each_rank_draws_numbers_of_its_own_and_the_same_every_time(runs: Runs) -> None:
    def drawn(rank: int) -> list[float]:
        rank_of = SimpleNamespace(world_size=2, process_index=rank, seed=0)
        trainer: Any = SimpleNamespace(args=rank_of, state=SimpleNamespace(global_step=3))
        with torch.random.fork_rng():
            RunTrainer._load_rng_state(trainer, str(runs.folder / "one" / "checkpoints" / "checkpoint-3"))
            return torch.rand(4).tolist()

    assert drawn(0) == drawn(0) != drawn(1) == drawn(1)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that says how many processes there are."""
    return lambda number: monkeypatch.setitem(PartialState()._shared_state, "num_processes", number)


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(
    runs: Runs, processes: Callable[[int], None]
) -> None:
    folder, settings = RunFolder(runs.folder / "one"), runs.settings("one")
    processes(3)
    with pytest.raises(UsageError, match=r"4 rows a step, and 3 processes of 2 rows .* a number of processes that"):
        restore_batch(settings, folder)
    processes(4)
    with pytest.raises(UsageError, match="expected --per_device_train_batch_size 1"):
        restore_batch(settings, folder)
    by_one = restore_batch(runs.settings("one", per_device_train_batch_size=1), folder)
    assert by_one.training["gradient_accumulation_steps"] == 1
    Journal(folder).refuse_another(settings_identity(by_one))


def test_another_global_batch_is_another_run(runs: Runs, processes: Callable[[int], None]) -> None:
    runs.interrupted("one", "other batch")
    folder = RunFolder(runs.folder / "other batch")
    processes(2)
    changed = restore_batch(runs.settings("other batch", gradient_accumulation_steps=8), folder)
    with pytest.raises(RunFolderError, match=r"gradient_accumulation_steps: was 2, now 8"):
        find_checkpoint(folder, changed)


def test_an_edited_number_of_processes_is_named(runs: Runs, processes: Callable[[int], None]) -> None:
    runs.interrupted("one", "edited")
    folder = RunFolder(runs.folder / "edited")
    content = json.loads(folder.started.read_text())
    folder.started.write_text(json.dumps({**content, "run": {**content["run"], "processes": "two"}}))
    with pytest.raises(RunFolderError, match=r"started\.json, key run\.processes: got 'two'"):
        restore_batch(runs.settings("edited"), folder)


def test_every_rank_waits_for_a_checkpoint_before_it_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1, which would else not load at the end what rank 0 loads, and leave it waiting."""
    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", lambda *_: None)
    monkeypatch.setattr(RunTrainer, "_progress", lambda self: TokenCount())
    best = tmp_path / "checkpoint-2"
    (tmp_path / WRITING / best.name).mkdir(parents=True)
    waits = [lambda: None, lambda: None, best.mkdir, lambda: None]  # the third ends when rank 0 has put it in place
    trainer: Any = object.__new__(RunTrainer)
    trainer.args = SimpleNamespace(output_dir=tmp_path, should_save=False, process_index=1)
    trainer.state = TrainerState(global_step=2, best_global_step=2)
    trainer.accelerator = SimpleNamespace(wait_for_everyone=lambda: waits.pop(0)())
    trainer._save_checkpoint(None, None)
    assert trainer.state.best_model_checkpoint == str(best)
