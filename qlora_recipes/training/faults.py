"""A full disk, a lack of permission or memory, or a lost process, as errors that say what is kept and how to fix it.

Knows nothing of trainers.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_recipes.base.device import first_line, is_out_of_memory
from qlora_recipes.errors import ModelError, RecipesError, SetupError
from qlora_recipes.memory import estimate
from qlora_recipes.preflight import ranks
from qlora_recipes.settings import Settings

_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ESTALE,
}  # fmt: skip
# What writers of tensors say instead of raising an OSError: torch.save, and safetensors with the system's number.
_WRITE_FAILED = re.compile(r"PytorchStreamWriter|file write failed|\(os error \d+\)|unexpected pos \d+ vs \d+")


class MemoryExhaustedError(SetupError):
    """The device or the machine has too little memory for a step."""


def is_machine_fault(error: Exception) -> bool:
    """Whether an exception says that memory, a disk or a permission is missing."""
    return isinstance(error, OSError) or is_out_of_memory(error) or bool(_WRITE_FAILED.search(str(error)))


@contextmanager
def machine_faults(settings: Settings) -> Iterator[None]:
    """Turn what libraries raise for a full disk, a lack of memory or a process that is gone into our errors.

    Raises:
        SetupError: saying what went wrong, what is kept and the fix.
    """
    try:
        yield
    except RecipesError:
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise SetupError(_cannot_write(settings, f"{error.strerror}: {error.filename or 'a file'}")) from error
    except Exception as error:
        text = first_line(error)
        if is_out_of_memory(error):
            raise MemoryExhaustedError(_no_memory(settings, text)) from error
        if _WRITE_FAILED.search(text):
            raise SetupError(_cannot_write(settings, text)) from error
        if ranks.is_lost_process(error):
            raise ranks.lost_process(error) from error
        raise


def _cannot_write(settings: Settings, reason: str) -> str:
    folder = settings.output_dir.absolute()
    existing = next(
        path
        for path in (folder, *folder.parents)
        if os.path.exists(path)  # noqa: PTH110  # Path.exists raises for a name that is too long
    )
    free = shutil.disk_usage(existing).free / 2**30
    return (
        f"{reason}; {free:,.2f} GiB are free at {existing}. The run stops here and keeps the checkpoints that were "
        "finished. Make room or make the folder writable, and give the same command with --resume"
    )


def _no_memory(settings: Settings, reason: str) -> str:
    batch, rows = settings.training.get(_BATCH, 8), settings.training.get("max_length")
    advice = "lower --max_length, or choose a --precision of fewer bits"
    if batch > 1 and ranks.several():
        advice = f"halve --{_BATCH} and double --{_ACCUMULATION}; {advice}"
    elif batch > 1:
        advice = f"give --auto_find_batch_size, which halves it and doubles --{_ACCUMULATION}; {advice}"
    return (
        f"out of memory with {batch} rows of up to {rows} tokens at a time ({reason}). {_planned(settings)}"
        f"The checkpoints that were finished are kept. To fix it, {advice}"
    )


def _planned(settings: Settings) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        total = estimate.plan(settings, device=device).training.total
    except ModelError:
        return ""
    return f"The plan was {total / 2**30:,.1f} GiB (--plan shows its parts). "


def halve_batch(settings: Settings) -> Settings | None:
    """Return settings with half the batch and twice the accumulation; None where not asked for or not possible.

    Not with several processes: one would begin again while the others wait for it in the middle of a step.
    """
    batch = settings.training.get(_BATCH, 8)
    if not settings.training.get("auto_find_batch_size") or batch < 2 or batch % 2 or ranks.several():
        return None
    accumulation = settings.training.get(_ACCUMULATION, 1)
    training = {**settings.training, _BATCH: batch // 2, _ACCUMULATION: accumulation * 2}
    return Settings(**{**vars(settings), "training": training})


def batch_of(settings: Settings) -> str:
    """Return the batch in words, such as `8 rows x 2 passes`."""
    return f"{settings.training.get(_BATCH, 8)} rows x {settings.training.get(_ACCUMULATION, 1)} passes"
