"""Train several runs one after the other in each of the processes that torchrun starts; a helper of test_sharding.py.

    torchrun --standalone --nproc_per_node 2 tests/sharded_runs.py FOLDER

Accelerate trains DDP where FSDP is asked for on a CPU, and says nothing: here it does what it does on GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import FAMILIES  # first: it keeps the hub and the GPU away
from rich.console import Console

from qlora_recipes import DatasetSpec, Recipe, environment
from qlora_recipes.base.adapters import attach
from qlora_recipes.base.loading import load_base
from qlora_recipes.base.sharding import shard
from qlora_recipes.errors import CheckError
from qlora_recipes.precision import precision_named
from qlora_recipes.run.signals import Stopped
from qlora_recipes.settings import Settings, resolve
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import RunTrainer

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": dict(precision="bf16"),
    "fsdp": dict(precision="bf16", variables=FSDP),
    "fsdp-stopped": dict(precision="bf16", variables=FSDP, stop_at=2),
    "fsdp-nf4": dict(precision="nf4", variables=FSDP, accumulation=2),
    "fsdp-nf4-stopped": dict(precision="nf4", variables=FSDP, accumulation=2, stop_at=2),
    "relabeled": dict(precision="bf16", variables=FSDP, as_on_gpus=False),
}


def settings_of(folder: Path, name: str, precision: str, accumulation: int) -> Settings:
    """Return the settings of a run of four steps, on the model and the rows in a folder."""

    class Sharded(Recipe):
        model = FAMILIES["llama2"]
        dataset = DatasetSpec(str(folder / "rows.jsonl"), held_out=0.1)
        lora = dict(r=4, lora_alpha=8, lora_dropout=0.0)
        training = dict(
            max_steps=4, max_length=128, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
            save_strategy="steps", save_steps=2, logging_steps=1, learning_rate=1e-3, gradient_checkpointing=True,
            eval_strategy="steps", eval_steps=2,
        )  # fmt: skip

    return resolve(Sharded, model=str(folder / "model"), output_dir=folder / name, precision=precision)


def train_one(folder: Path, name: str) -> None:
    """Train a run, and resume it where it is to be stopped; a run that is refused leaves `NAME.txt`."""
    choices = RUNS[name]
    os.environ.update(choices.get("variables", {}))
    label(choices.get("as_on_gpus", True))
    settings = settings_of(folder, name, choices["precision"], choices.get("accumulation", 1))
    console = Console(quiet=True)
    slow = [] if name == "fsdp-nf4" else ["answers_end", "gradient_after_evaluation", "packing_leak"]
    try:
        if stop_at := choices.get("stop_at"):
            with _stopped_in(stop_at), contextlib.suppress(Stopped):
                train(settings, console=console, skip_checks=slow)
        train(settings, console=console, resume=bool(stop_at), skip_checks=slow)
    except CheckError as error:
        (folder / f"{name}.txt").write_text(str(error))


def load_one(folder: Path) -> None:
    """Load and divide the base `large`, and write as `memory-RANK.json` by how many bytes this process grew."""
    os.environ.update(FSDP)
    sizes, stop = [_own_memory()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            sizes.append(_own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    device = PartialState(cpu=True).device
    base, receipt, _ = load_base(
        str(folder / "large"), None, precision_named("bf16"), "bfloat16", device=device, divide=True
    )
    shard(attach(base, {"target_modules": ["q_proj"]}, seed=0))
    stop.set()
    watcher.join()
    grown = dict(peak=max(sizes) - sizes[0], after=_own_memory() - sizes[0], base=receipt.bytes)
    (folder / f"memory-{os.environ['RANK']}.json").write_text(json.dumps(grown))


def _own_memory() -> int:
    """Return the resident bytes of this process that are not those of files, which it shares."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class _stopped_in:
    """Send this process SIGTERM in the first micro-batch of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> None:
        self.plain, step = RunTrainer.training_step, self.step

        def training_step(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if trainer.state.global_step == step - 1 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return _stopped_in.plain(trainer, *args, **kwargs)

        _stopped_in.plain = self.plain
        RunTrainer.training_step = training_step

    def __exit__(self, *_: object) -> None:
        RunTrainer.training_step = self.plain


_PLAIN = AcceleratorState.__init__


def label(as_on_gpus: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        _PLAIN(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init if as_on_gpus else _PLAIN


def main() -> None:
    folder = Path(sys.argv[1])
    vars(environment)["keep_freed_memory"] = lambda: None  # of a training; `load_one` measures what is freed
    for name in RUNS:
        for variable in FSDP:
            os.environ.pop(variable, None)
        train_one(folder, name)
    load_one(folder)


if __name__ == "__main__":
    main()
