"""What the run stands on: versions, disk, memory, folders and the hub."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from qlora_recipes import environment
from qlora_recipes.preflight.verdicts import fail_unless, passed
from qlora_recipes.run.receipt import Check
from qlora_recipes.settings import model_location
from qlora_recipes.stages import ReadRun, ReadyRun

_CHECKPOINT_PARTS = 3  # float32 weights and Adam's two moments of the same size
_HUB_SECONDS = 3


def versions(run: ReadRun) -> Check:
    """Package versions outside the tested ranges are refused with the command that mends them."""
    environment.check_versions()
    found = environment.versions()
    return passed(
        ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    )


def writable_folder(run: ReadRun) -> Check:
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


def disk_space(run: ReadyRun) -> Check:
    """The adapter and its checkpoints fit, with a reserve of a tenth of a GiB."""
    adapter = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad) * 4
    need = adapter * (1 + _CHECKPOINT_PARTS * _checkpoints(run)) + 2**30 // 10
    free = shutil.disk_usage(_existing(run.settings.output_dir)).free
    return fail_unless(
        need < free,
        f"{need / 2**30:,.1f} GiB needed, {free / 2**30:,.1f} GiB free",
        "Give --output_dir another disk, or set --save_total_limit.",
    )


def _checkpoints(run: ReadyRun) -> int:
    """How many checkpoints lie on the disk at once; one more than are kept, since the old one goes last."""
    args = run.trainer.args
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    steps = args.max_steps if args.max_steps > 0 else len(run.trainer.train_dataset) * args.num_train_epochs
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    made = args.num_train_epochs if strategy == "epoch" else steps / max(every, 1)
    return min(int(made) + 1, (args.save_total_limit or 10**6) + 1)


def hub(run: ReadRun) -> Check:
    """The hub is asked for only where the run needs it: a model or rows by id, or an upload at the end."""
    upload = bool(run.settings.training.get("push_to_hub"))
    by_id = [
        source for source in (model_location(run.settings.model), run.settings.dataset) if not Path(source).exists()
    ]
    if not upload and not by_id:
        return passed("not needed")
    reachable = _hub_answers()
    if upload:
        advice = "Mend the network, or leave --push_to_hub out."
        return fail_unless(reachable, "reachable" if reachable else "out of reach, and expected at the end", advice)
    return passed("reachable" if reachable else f"out of reach; {' and '.join(by_id)} came from the cache")


def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=_HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answers
    except OSError:
        return False
