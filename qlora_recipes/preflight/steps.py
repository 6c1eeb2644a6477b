"""How far the run will go."""

from __future__ import annotations

import math

from qlora_recipes.preflight.verdicts import warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import ReadyRun

_FEW = 10


def steps(run: ReadyRun) -> Check:
    """A run of a few steps, or one that ends while the learning rate still rises, hardly learns."""
    args = run.trainer.args
    rows = len(run.trainer.train_dataset)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * run.trainer.accelerator.num_processes
    total = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(rows / batch) * args.num_train_epochs)
    warm_up = args.get_warmup_steps(total)
    return warn_unless(
        total >= _FEW and warm_up < total / 2,
        f"{total:,} of {batch} rows each, {warm_up:,} of them warm-up",
        "Few steps hardly learn: lower --gradient_accumulation_steps, or raise --num_train_epochs.",
    )
