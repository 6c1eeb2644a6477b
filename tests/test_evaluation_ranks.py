"""Two processes that score a run together write what one writes alone: every score, answer and hash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_recipes import Recipe, environment
from qlora_recipes.evaluation.harness import Options, evaluate_many
from qlora_recipes.evaluation.records import DocRecord, TaskResult, read_task
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train

TASKS = ["standin_choice", "standin_answer", "standin_text", "held_out", "held_out_answers"]
FLAGS = {"limit": 9, "batch_size": 2, "temperature": 1.5, "max_new_tokens": 8, "seed": 3}
SKIPPED = ("answers_end", "gradient_after_evaluation", "packing_leak", "starting_loss", "tokenizer_reloads")


@pytest.fixture(scope="module")
def alone_and_together(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, RunFolder, str]:
    """Return a run scored by one process, a copy scored by two, and what those said."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = resolve(recipe_for(), model=str(tiny("llama2")), output_dir=folder / "alone")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "share_threads", lambda: None)
        torch.set_num_threads(1)
        alone = train(settings, skip_checks=SKIPPED)
        together = RunFolder(Path(shutil.copytree(alone.path, folder / "together")))
        words = [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "qlora_recipes.cli"]
        command = [sys.executable, *launch, "evaluate", str(together.path), "--tasks", *TASKS, *words]
        with subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            try:
                evaluate_many([alone], TASKS, options=Options(**FLAGS))
                said, _ = process.communicate(timeout=120)
            finally:
                process.terminate()
                torch.set_num_threads(threads)
    assert process.returncode == 0, said.decode()
    return alone, together, said.decode()


def scored(run: RunFolder, task: str) -> tuple[TaskResult, list[DocRecord]]:
    result, docs = read_task(run.evaluation, task)
    return replace(result, seconds=0, seconds_by_part={}), docs


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_write_what_one_writes(task: str, alone_and_together: tuple[RunFolder, RunFolder, str]) -> None:
    alone, together, _ = alone_and_together
    assert scored(together, task) == scored(alone, task)


def test_one_of_them_speaks(alone_and_together: tuple[RunFolder, RunFolder, str]) -> None:
    assert alone_and_together[2].count("seconds by part") == 1
