"""Every file of recipes/launch is read by the tool that it is for, and run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from forked_ranks import start_ranks

from qlora_recipes.recipe import load_recipe
from qlora_recipes.run.checkpoints import checkpoints
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import resolve
from qlora_recipes.standins import ROWS
from qlora_recipes.training.train import train

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "recipes" / "launch"
RECIPE = """
from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import LLAMA_2_7B_CHAT


class Tiny(Recipe):
    model = LLAMA_2_7B_CHAT
    dataset = DatasetSpec({rows!r}, held_out=0.1)
    lora = dict(r=4)
    training = dict(
        max_steps=4, max_length=128, per_device_train_batch_size=2, gradient_accumulation_steps=1,
        save_strategy="steps", save_steps=2,
    )


if __name__ == "__main__":
    Tiny.main()
"""
SKIPPED = ["answers_end", "gradient", "gradient_after_evaluation", "packing_leak", "starting_loss", "tokenizer_reloads"]
# What Slurm does, as far as the script uses it: a task on each node, which gets the signals that srun gets.
SRUN = """
import os, signal, subprocess, sys
command = [word for i, word in enumerate(sys.argv[1:]) if i or not word.startswith("--")]
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)})
    for node in range(int(os.environ["SLURM_NNODES"]))
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import os, sys
if sys.argv[1] == "requeue":
    open(os.environ["REQUEUED"], "a").write(sys.argv[2])
else:
    print("127.0.0.1")
"""


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_file(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_machines == 1 and not config.use_cpu
    assert config.mixed_precision is None  # --dtype decides


def test_accelerate_starts_what_the_files_say(tmp_path: Path) -> None:
    script = tmp_path / "told.py"
    script.write_text(
        "import json, os\nfrom qlora_recipes import environment\nenvironment.check_launch()\n"
        "told = [environment.sharding_asked(), os.environ.get('WORLD_SIZE'), os.environ.get('FSDP_VERSION')]\n"
        "open(f\"told-{os.environ['FILE']}-{os.environ.get('RANK', 0)}\", 'w').write(json.dumps(told))\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    started = [
        subprocess.Popen(
            [*launch, LAUNCH / f"{name}.yaml", script], cwd=tmp_path, stderr=subprocess.DEVNULL,
            env=dict(os.environ, FILE=name),
        )
        for name in ("one_gpu", "fsdp_qlora")
    ]  # fmt: skip
    assert [process.wait(60) for process in started] == [0, 0]
    told = {file.name.removeprefix("told-"): json.loads(file.read_text()) for file in tmp_path.glob("told-*")}
    both = ["FSDP", "2", "2"]
    assert told == {"one_gpu-0": [None, None, None], "fsdp_qlora-0": both, "fsdp_qlora-1": both}


# ---- Slurm ----


class Job:
    """The Slurm script on two nodes that are both here."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.requeued = folder, folder / "requeued"
        tools = folder / "bin"
        tools.mkdir()
        for name, source in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (tools / name).write_text(f"#!{sys.executable}\n{source}")
            (tools / name).chmod(0o755)
        (tools / "accelerate").symlink_to(Path(sys.executable).with_name("accelerate"))
        rows = folder / "rows.jsonl"
        rows.write_text("".join(ROWS["guanaco_llama2"].read_text().splitlines(keepends=True)[:40]))
        self.recipe = folder / "tiny.py"
        self.recipe.write_text(RECIPE.format(rows=str(rows)))
        self.words = ["--model", str(model), "--skip_checks", *SKIPPED]
        self.variables = {
            **{"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid())},
            **{"CONFIG": str(LAUNCH / "ddp.yaml"), "REQUEUED": str(self.requeued), "OMP_NUM_THREADS": "1"},
            **{"PATH": f"{tools}:{os.environ['PATH']}"},
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, output: Path) -> subprocess.Popen[str]:
        words = [str(LAUNCH / "slurm.sh"), str(self.recipe), *self.words, "--output_dir", str(output)]
        with (self.folder / "log.txt").open("a") as log:
            self.started.append(
                subprocess.Popen(
                    words, cwd=self.folder, env={**os.environ, **self.variables}, start_new_session=True, text=True,
                    stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        return self.started[-1]

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def job(tmp_path: Path, tiny: Callable[[str], Path]) -> Iterator[Job]:
    made = Job(tmp_path, tiny("llama2"))
    yield made
    made.end()


def test_the_slurm_script_trains_on_two_nodes(job: Job) -> None:
    output = job.folder / "out"
    assert job.start(output).wait(100) == 0, job.log()
    receipt = RunFolder(output).receipt()
    assert receipt.training.processes == 2 and receipt.training.steps == 4 and not receipt.resumes
    assert not job.requeued.exists()


@pytest.mark.slow
def test_a_slurm_job_that_is_stopped_goes_back_into_the_queue_and_ends_the_same(job: Job) -> None:
    output, whole = job.folder / "out", job.folder / "whole"
    job.words += ["--max_steps", "60", "--save_steps", "4"]
    process = job.start(output)
    until = time.monotonic() + 100
    while not checkpoints(output / "checkpoints") and time.monotonic() < until:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(100) != 0
    assert job.requeued.read_text() == job.variables["SLURM_JOB_ID"], job.log()
    assert not RunFolder(output).finished and "has the checkpoint of step" in job.log()
    assert job.start(output).wait(100) == 0, job.log()

    def train_whole(rank: int) -> None:
        training = dict(max_steps=60, save_steps=4)
        model = job.words[1]
        train(resolve(load_recipe(job.recipe), model=model, output_dir=whole, training=training), skip_checks=SKIPPED)

    assert start_ranks(2, train_whole, job.folder / "ranks").wait() == {0: 0, 1: 0}
    resumed, straight = (RunFolder(folder).receipt() for folder in (output, whole))
    assert resumed.resumes and resumed.adapter.final_sha256 == straight.adapter.final_sha256


@pytest.mark.slow
def test_fsdp_on_a_cpu_is_one_error_and_every_process_ends(job: Job) -> None:
    job.variables["CONFIG"] = str(LAUNCH / "fsdp_qlora.yaml")
    assert job.start(job.folder / "out").wait(150) != 0
    assert job.log().count("error: ") == 1 and "FSDP was asked for" in job.log()
