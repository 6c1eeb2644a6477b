"""What was asked for at the launch is what the accelerator really has, and the run is long enough to learn.

Changes nothing of the run.
"""

from __future__ import annotations

import math
import os
from typing import cast

import torch
from datasets import Dataset

from qlora_recipes import environment
from qlora_recipes.preflight.checks import fail_unless, warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

_PRECISION = {"bfloat16": "bf16", "float16": "fp16"}
_FEW_STEPS = 10
_SEVERAL = "several"


def num_processes(run: Run) -> Check:
    """`accelerate launch --cpu --num_processes 2` trains one process and says nothing."""
    got = run.trainer.accelerator.num_processes
    asked = asked_processes()
    return fail_unless(
        asked in (None, str(got)) or (asked == _SEVERAL and got > 1),
        f"{got}" if asked in (None, str(got)) else f"{got} of {asked} asked for",
        "On GPUs launch with --multi_gpu; on CPUs with: torchrun --nproc_per_node N recipes/....py",
    )


def asked_processes() -> str | None:
    """Return the number of processes that the launcher was asked for, as its environment tells it; None without one.

    `accelerate launch` sets MASTER_ADDR whenever it was asked for more than one (accelerate 1.15, utils/launch.py), and
    WORLD_SIZE only where it starts them.
    """
    under_accelerate = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    return os.environ.get("WORLD_SIZE", _SEVERAL if under_accelerate else None)


def distributed_type(run: Run) -> Check:
    """FSDP that was asked for on a CPU becomes DDP without a word."""
    got = str(run.trainer.accelerator.distributed_type.value)
    asked = environment.sharding_asked()
    holds = asked in (None, got)
    return fail_unless(
        holds,
        got.replace("NO", "none") if holds else f"{got}, {asked} was asked for",
        "Sharding needs GPUs here; leave the FSDP config out on a CPU.",
    )


def device(run: Run) -> Check:
    """A GPU that is idle while a CPU or another GPU trains is rarely meant."""
    got = run.trainer.args.device
    base = next(run.model.parameters()).device
    if base.type != got.type:
        return fail_unless(False, f"base on {base}, trainer on {got}", "Launch one process for each GPU.")
    name = torch.cuda.get_device_name(got) if got.type == "cuda" else f"{got.type}, threads: {torch.get_num_threads()}"
    idle = torch.cuda.device_count() - environment.local_processes()
    if got.type == "cuda" and idle > 0:
        advice = "To train on all, launch with recipes/launch/ddp.yaml; CUDA_VISIBLE_DEVICES hides the others."
        return warn_unless(False, f"{name}, and {idle} more without a process of this run", advice)
    return warn_unless(
        got.type == "cuda" or not torch.cuda.is_available(), name, "A GPU is there: leave --use_cpu and --cpu out."
    )


def mixed_precision(run: Run) -> Check:
    """The autocast of the accelerator is the run's dtype; ACCELERATE_MIXED_PRECISION can say otherwise."""
    got, expected = run.trainer.accelerator.mixed_precision, _PRECISION[run.settings.dtype]
    return fail_unless(
        got == expected,
        got if got == expected else f"{got}, expected {expected}",
        "Leave mixed_precision out of the launcher's flags and config; --dtype decides.",
    )


def steps(run: Run) -> Check:
    """A run of a few steps, or one that ends while the learning rate still rises, hardly learns."""
    args = run.trainer.args
    rows = len(cast(Dataset, run.trainer.train_dataset))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * run.trainer.accelerator.num_processes
    total = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(rows / batch) * args.num_train_epochs)
    warm_up = args.get_warmup_steps(total)
    more = "--max_steps" if args.max_steps > 0 else "--num_train_epochs"
    return warn_unless(
        total >= _FEW_STEPS and warm_up < total / 2,
        f"{total:,} of {batch} rows each, {min(warm_up, total):,} of them warm-up",
        f"Few steps hardly learn: lower --gradient_accumulation_steps, or raise {more}.",
    )
