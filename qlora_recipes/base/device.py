"""The device that a model goes to: a GPU that PyTorch can use, or a CPU that is meant; and its memory, freed or full.

Knows no model.
"""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import torch

from qlora_recipes.errors import SetupError

_NODES, _DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
_NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory|STATUS_ALLOC_FAILED", re.IGNORECASE)
_OLDEST_DRIVER = {"12": 525, "13": 580}
"""Major version of CUDA to that of the oldest NVIDIA driver that runs it (CUDA's release notes, minor versions)."""
_ON_CPU = "To use the CPU all the same, put CUDA_VISIBLE_DEVICES= in front of the command"


def torch_device() -> torch.device:
    """Return the device of this process outside of training, its own GPU behind a launcher; raises as `check_gpu`."""
    check_gpu()
    if cpu_asked() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _own_gpu())


def _own_gpu() -> int:
    """Return the number of this process's GPU, chosen as accelerate does."""
    return int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()


def cpu_asked() -> bool:
    """Whether the CPU is meant: `accelerate launch --cpu`, or CUDA_VISIBLE_DEVICES that names no GPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return hidden or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")


def check_gpu() -> None:
    """Refuse an NVIDIA GPU that PyTorch cannot use: without a word the CPU would do the work, or a kernel would fail.

    Raises:
        SetupError: with the versions of the driver and of PyTorch's CUDA, and what fits them.
    """
    if cpu_asked() or not any(_NODES.glob("nvidia[0-9]*")):
        return
    if torch.cuda.is_available():
        _check_architecture()
        return
    raise SetupError(f"an NVIDIA GPU is there and PyTorch cannot use it: {_why_unusable()}. {_ON_CPU}")


def _why_unusable() -> str:
    """Return the versions that were found, what was expected of them, and the fix."""
    driver, cuda = _driver(), torch.version.cuda
    found = f"got driver {driver or 'of an unknown version'} and torch {torch.__version__}"
    if cuda is None:
        return (
            f"{found}, which is built without CUDA; expected one with it. With driver {_OLDEST_DRIVER['13']} or newer: "
            f"pip install --force-reinstall torch=={_release()} --index-url https://pypi.org/simple"
        )
    found, oldest = f"{found} for CUDA {cuda}", _OLDEST_DRIVER.get(cuda.partition(".")[0], 0)
    if driver is None or int(driver.partition(".")[0]) >= oldest:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            found = f"{found}: {first_line(error).rstrip('.')}"
        return f"{found}. nvidia-smi says whether the driver itself finds the GPU"
    older = f"; for a GPU before Blackwell and a driver from {_OLDEST_DRIVER['12']} on, {_for_cuda_12()}"
    return f"{found}, expected driver {oldest} or newer. Update the driver{older if oldest > 525 else ''}"


def _check_architecture() -> None:
    """Refuse a GPU that this build of PyTorch has no kernels for."""
    index = _own_gpu()
    major, minor = torch.cuda.get_device_capability(index)
    built = torch.cuda.get_arch_list()
    if not built or any(_runs(each, major, minor) for each in built):
        return
    # PyTorch's RELEASE.md, 2.11 and 2.12: only wheels for CUDA 12.6 have sm_60 and sm_70; bitsandbytes has them too.
    older = (6, 0) <= (major, minor) <= (7, 0)
    fix = f"For this GPU {_for_cuda_12()}, and give --dtype float16: it has no bfloat16" if older else "Update PyTorch"
    raise SetupError(
        f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}, driver {_driver() or 'unknown'}) is none of the GPUs "
        f"that torch {torch.__version__} for CUDA {torch.version.cuda} is built for: got sm_{major}{minor}, expected "
        f"{', '.join(built)}. {fix}. {_ON_CPU}"
    )


def _runs(architecture: str, major: int, minor: int) -> bool:
    """Whether a GPU runs kernels of `sm_86` (of its generation, and no newer), or `compute_86`, which it compiles."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)", architecture)
    if found is None:  # such as sm_90a, of one GPU alone
        return architecture.rstrip("af") == f"sm_{major}{minor}"
    kind, of = found[1], (int(found[2]), int(found[3]))
    return of <= (major, minor) and (kind == "compute" or of[0] == major)


def _for_cuda_12() -> str:
    return (
        f"install a build for CUDA 12.6: pip install torch=={_release()} --index-url "
        "https://download.pytorch.org/whl/cu126"
    )


def _release() -> str:
    return torch.__version__.partition("+")[0]


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel driver, such as 550.54.15; None where the system does not say."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", _DRIVER.read_text())
    except OSError:
        return None
    return found[0] if found else None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of a library says that the device or the machine has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(_NO_MEMORY.search(first_line(error)))


def first_line(error: Exception) -> str:
    """Return what an error says first, or else its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def release_memory() -> None:
    """Free what is no longer referred to, so that the next base finds the room that one before it had."""
    gc.collect()  # trainers and lm-eval's models refer to themselves
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
