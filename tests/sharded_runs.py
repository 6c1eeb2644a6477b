"""Train several runs one after the other in each of the processes that torchrun starts; a helper of test_sharding.py.

    torchrun --standalone --nproc_per_node 2 tests/sharded_runs.py FOLDER RUN...

Accelerate trains DDP where FSDP is asked for on a CPU, and says nothing: here it does what it does on GPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import FAMILIES  # first: it keeps the hub and the GPU away
from rich.console import Console

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.run.signals import Stopped
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import RunTrainer

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
RUNS: dict[str, dict[str, Any]] = {
    "one": dict(precision="bf16", accumulation=4),
    "one-nf4": dict(precision="nf4", accumulation=4),
    "ddp": dict(precision="bf16"),
    "fsdp": dict(precision="bf16", variables=FSDP),
    "fsdp-stopped": dict(precision="bf16", variables=FSDP, stop_at=2),
    "fsdp-nf4": dict(precision="nf4", variables=FSDP),
    "fsdp-nf4-stopped": dict(precision="nf4", variables=FSDP, stop_at=2),
    "fsdp-relabeled": dict(precision="bf16", variables=FSDP, as_on_gpus=False),
}
"""`one` sees in four micro-batches a step what each of two processes sees in two."""


def settings_of(folder: Path, name: str, **choices: Any) -> Any:
    """Return the settings of a run of four steps, on the model and the rows in a folder."""

    class Sharded(Recipe):
        model = FAMILIES["llama2"]
        dataset = DatasetSpec(str(folder / "rows.jsonl"), held_out=0.1)
        lora = dict(r=4, lora_alpha=8, lora_dropout=0.0)
        training = dict(
            max_steps=4, max_length=128, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=2, logging_steps=1, learning_rate=1e-3,
            gradient_checkpointing=True,
        )  # fmt: skip

    training = dict(gradient_accumulation_steps=choices.get("accumulation", 2))
    model, precision = str(folder / "model"), choices["precision"]
    return resolve(Sharded, model=model, output_dir=folder / name, precision=precision, training=training)


def train_one(folder: Path, name: str) -> None:
    """Train a run, resuming it where it is to be stopped, and write what this process held as `NAME-RANK.json`."""
    choices = RUNS[name]
    os.environ.update(choices.get("variables", {}))
    _label_as_on_gpus(choices.get("as_on_gpus", True))
    settings, console = settings_of(folder, name, **choices), Console(file=(folder / "log.txt").open("a"), width=200)
    if stop_at := choices.get("stop_at"):
        with _stopped_in(stop_at), contextlib.suppress(Stopped):
            train(settings, console=console)
    train(settings, console=console, resume=bool(stop_at))


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


def _label_as_on_gpus(as_on_gpus: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    state = PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        _PLAIN(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init if as_on_gpus else _PLAIN
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        for variable in FSDP:
            os.environ.pop(variable, None)
        train_one(folder, name)


if __name__ == "__main__":
    main()
