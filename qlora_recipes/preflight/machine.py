"""What the machine gives a run: package versions, folders, disk, the hub, and the memory that was planned for.

Changes nothing of the run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import cast

import psutil
import torch
from accelerate import PartialState
from datasets import Dataset

from qlora_recipes import environment
from qlora_recipes.base import upstream
from qlora_recipes.base.sharding import divides
from qlora_recipes.errors import ModelError
from qlora_recipes.memory import estimate, ranks
from qlora_recipes.preflight.checks import fail_unless, passed, untested, warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.settings import model_location
from qlora_recipes.stages import Run

_CHECKPOINT_PARTS = 3  # float32 weights and Adam's two moments of the same size
_OWN_GROWTH = 2**30  # of a process as it runs: what is imported late, kernels, buffers of threads
_LOWER = "Lower --per_device_train_batch_size or --max_length, or choose a precision of fewer bits."


def versions(run: Run) -> Check:
    """A package outside its tested range is a warning; a fail where a name of it is gone, or replaced and changed."""
    found, shown = environment.versions(), ("torch", "transformers", "trl", "peft", "bitsandbytes")
    outside = environment.outside_tested()
    if not outside:
        return passed(", ".join(f"{name} {found[name]}" for name in shown))
    changed = [name for need in outside for name in upstream.changed(need.name)]
    figures = [f"{need.name} {version}, expected {need.specifier}" for need, version in outside.items()]
    for name in changed:
        use = "replaces" if name.is_replaced() else "reads"
        figures.append(f"{name.name} of {name.owner.replace(':', '.')}, which {name.file} {use}, has changed")
    repaired = {need.name: repairs for need in outside if (repairs := upstream.repaired(need.name))}
    advice = [f"Defects of {name} are repaired by {', '.join(repairs)}." for name, repairs in repaired.items()]
    wrong = any(name.is_replaced() or upstream.fingerprint(name) == upstream.ABSENT for name in changed)
    return Check(
        "",
        "fail" if wrong else "warn",
        f"outside the tested versions: {'; '.join(figures)}",
        " ".join([*advice, environment.install(outside)]),
    )


def writable_folder(run: Run) -> Check:
    """The run folder, or the nearest folder above it, takes new files."""
    folder = _existing(run.settings.output_dir)
    return fail_unless(
        folder.is_dir() and os.access(folder, os.W_OK | os.X_OK),
        str(run.settings.output_dir),
        f"{folder} takes no new files; give --output_dir another folder.",
    )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def disk_space(run: Run) -> Check:
    """The adapter and its checkpoints fit, with a reserve of a tenth of a GiB."""
    adapter = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad) * 4
    need = adapter * (1 + _CHECKPOINT_PARTS * _checkpoints(run)) + 2**30 // 10
    free = shutil.disk_usage(_existing(run.settings.output_dir)).free
    return fail_unless(
        need < free,
        f"{need / 2**30:,.1f} GiB needed, {free / 2**30:,.1f} GiB free",
        "Give --output_dir another disk, or set --save_total_limit.",
    )


def _checkpoints(run: Run) -> int:
    """Return how many checkpoints are on the disk at once; one more than are kept, since the old one goes last."""
    args = run.trainer.args
    if args.save_strategy == "no":
        return 0
    rows = len(cast(Dataset, run.trainer.train_dataset))
    steps = args.max_steps if args.max_steps > 0 else rows * args.num_train_epochs
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    made = args.num_train_epochs if args.save_strategy == "epoch" else steps / max(every, 1)
    return min(int(made) + 1, (args.save_total_limit or 10**6) + 1)


def hub(run: Run) -> Check:
    """The hub is asked for only where the run needs it: a model or rows by id."""
    sources = (model_location(run.settings.model), *(spec.source for spec in run.settings.datasets))
    by_id = [source for source in sources if not Path(source).exists()]
    if not by_id:
        return passed("not needed")
    reached = environment.hub_answers()
    return passed("reachable" if reached else f"cannot be reached; {' and '.join(by_id)} came from the cache")


# ---- Memory: what the plan promises, what there is, and what the run really takes ----


def memory_free(run: Run) -> Check:
    """The planned peak fits into what is free before the base is loaded."""
    state = PartialState()
    device = state.device
    try:
        planned = ranks.planned(run.settings, device.type, state.num_processes, divided=divides())
    except ModelError as error:
        return untested(f"no plan: {error}")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    figure = f"{_size(planned.total)} planned, {_size(free)} free"
    if planned.base > free:
        return fail_unless(False, f"{figure}, {_size(planned.base)} for the base alone", _LOWER)
    return warn_unless(planned.total <= free, figure, _LOWER)


def base_bytes(run: Run) -> Check:
    """The base takes the memory that its precision promises."""
    try:
        planned = estimate.plan(run.settings).training.base
    except ModelError as error:
        return untested(f"{_size(run.base.bytes)}, and no plan: {error}")
    return warn_unless(
        abs(run.base.bytes - planned) <= 0.02 * planned,
        f"{_size(run.base.bytes)}, {_size(planned)} planned",
        "Something is stored in another dtype than planned; run.json counts bytes by storage.",
    )


def peak_as_planned(run: Run) -> Check:
    """Training took the memory that was planned for it, or less: rows are seldom all as long as they may be."""
    taken, planned = run.memory.training_bytes, run.memory.planned_bytes
    if planned is None:
        return untested("there is no plan for this model")
    figure, fits = f"{_size(taken)}, {_size(planned)} planned", taken <= 1.1 * planned + _OWN_GROWTH
    if fits and 1.1 * planned < _OWN_GROWTH:
        return untested(f"{figure}; a process may grow by {_size(_OWN_GROWTH)} of its own, more than that plan")
    return warn_unless(
        fits, figure, "Plan with more room than that; run.json has the settings that the plan was made for."
    )


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
