"""Memory: what the plan promises, what there is, and what the base really takes."""

from __future__ import annotations

import psutil
import torch
from accelerate import PartialState

from qlora_recipes import environment
from qlora_recipes.errors import ModelError
from qlora_recipes.memory import estimate
from qlora_recipes.preflight.verdicts import fail_unless, passed, warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import ReadRun, ReadyRun, TrainedRun

_OWN_GROWTH = 2**30  # of a process as it runs: what is imported late, kernels, buffers of threads
_LOWER = "Lower --per_device_train_batch_size or --max_length, or choose a precision of fewer bits."


def memory_free(run: ReadRun) -> Check:
    """The planned peak fits into what is free before the base is loaded."""
    device = PartialState().device
    try:
        planned = estimate.plan(run.settings, device=device.type).training
    except ModelError as error:
        return passed(f"no plan: {error}")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    figure = f"{_size(planned.total)} planned, {_size(free)} free"
    if planned.base > free:
        return fail_unless(False, f"{figure}, {_size(planned.base)} for the base alone", _LOWER)
    return warn_unless(planned.total <= free, figure, _LOWER)


def base_bytes(run: ReadyRun) -> Check:
    """The base takes the memory that its precision promises."""
    try:
        planned = estimate.plan(run.settings).training.base
    except ModelError as error:
        return passed(f"{_size(run.base.bytes)}; no plan: {error}")
    return warn_unless(
        abs(run.base.bytes - planned) <= 0.02 * planned,
        f"{_size(run.base.bytes)}, {_size(planned)} planned",
        "Something is stored in another dtype than planned; run.json counts bytes by storage.",
    )


def peak_as_planned(run: TrainedRun) -> Check:
    """The training took the memory that was planned for it, or less: rows are seldom all as long as they may be."""
    device = PartialState().device.type
    try:
        planned = estimate.plan(run.settings, device=device, processes=PartialState().num_processes).training.allocated
    except ModelError as error:
        return passed(f"no plan: {error}")
    taken = environment.peak_since_reset(device) - run.non_weight_bytes
    return warn_unless(
        taken <= 1.1 * planned + _OWN_GROWTH,
        f"{_size(taken)}, {_size(planned)} planned",
        "Plan with more room than that; run.json has the settings that the plan was made for.",
    )


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
