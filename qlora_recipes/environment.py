"""The machine and what is installed on it: package versions, git state, threads and memory. Knows nothing of runs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import platform
import resource
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from qlora_recipes.errors import SetupError, UsageError

BESIDE = "QLORA_RECIPES_JOBS"
"""Variable with the number of runs that `benchmark --jobs` has side by side on this machine."""
_DISTRIBUTION = "qlora-recipes"
_CGROUP = "/sys/fs/cgroup"
_OWN_GROUPS = Path("/proc/self/cgroup")
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RECORDED = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "lm-eval", "evaluate",
    "tokenizers", "safetensors", "numpy",
)  # fmt: skip
_COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_LAUNCHERS = "accelerate launch and torchrun set it; without one of them unset it"
_SHARDING = {
    "FSDP_VERSION": ("1", "2", "FSDP1 needs one dtype in a block, and the adapter is float32"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "FULL_STATE_DICT", "with another no adapter is saved"),
}


def outside_tested() -> dict[Requirement, str]:
    """Return each package whose version is outside the tested range, which setup.cfg states, with that version.

    Raises:
        SetupError: naming each that is missing, and the command that installs it.
    """
    if _version(_DISTRIBUTION) is None:
        raise SetupError(f"{_DISTRIBUTION} is not installed; in its folder run: pip install -c constraints.txt -e .")
    asked = map(Requirement, importlib.metadata.requires(_DISTRIBUTION) or ())
    needed = [need for need in asked if need.marker is None or need.marker.evaluate({"extra": ""})]
    found = {need: _version(need.name) for need in needed}
    if missing := [need for need, version in found.items() if version is None]:
        names = ", ".join(need.name for need in missing)
        raise SetupError(f"not installed: {names}, expected {', '.join(map(str, missing))}. {install(missing)}")
    return {need: got for need, got in found.items() if got and not need.specifier.contains(got, prereleases=True)}


def install(needs: Iterable[Requirement]) -> str:
    """Return what to run for a tested version of each."""
    return f"Run: pip install {' '.join(repr(str(need)) for need in needs)}"


def versions() -> dict[str, str]:
    """Return the version of this package, of Python and of every package that can change a result."""
    return {
        _DISTRIBUTION: _version(_DISTRIBUTION) or "not installed",
        "python": platform.python_version(),
        **{name: version for name in _RECORDED if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Return the commit of the folder the command runs in and whether it is clean; None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "clean": not _git("status", "--porcelain")}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def check_launch() -> None:
    """Refuse variables of a launcher that are no numbers, or of which some are set and others are not.

    Raises:
        UsageError: naming the variable.
    """
    given = {name: os.environ[name] for name in (*_COUNTS, "MASTER_ADDR") if name in os.environ}
    for name in given.keys() - {"MASTER_ADDR"}:
        if not given[name].isdecimal():
            raise UsageError(f"{name}: got {given[name]!r}, expected a whole number from 0 up. {_LAUNCHERS}")
    for number, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if int(given.get(number, 0)) >= int(given.get(count, 10**9)):
            raise UsageError(
                f"{number}: got {given.get(number, 0)}, expected less than {count}={given[count]}. {_LAUNCHERS}"
            )
    several = int(given.get("WORLD_SIZE", 1)) > 1 or int(given.get("RANK", 0)) > 0 or "LOCAL_RANK" in given
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if several and missing:
        found = " ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(f"{missing[0]}: not set, expected with {found}. {_LAUNCHERS}")


def check_sharding() -> None:
    """Refuse a way to divide a model among processes that cannot be resumed safely, or saves nothing.

    Raises:
        UsageError: naming what to launch with in its place.
    """
    if sharding_asked() == "DEEPSPEED":
        raise UsageError(
            "DeepSpeed: its checkpoints are pickles, which it opens without a restriction and which can run code; and "
            "all that ZeRO-2 divides of a LoRA run is the optimizer's state of the adapter. Launch with "
            "recipes/launch/ddp.yaml, or with fsdp_qlora.yaml, which divides the base"
        )
    for name, (unset, expected, why) in _SHARDING.items() if sharding_asked() == "FSDP" else ():
        if (got := os.environ.get(name, unset)) != expected:
            raise UsageError(
                f"{name}: got {got}, expected {expected}: {why}. Launch with recipes/launch/fsdp_qlora.yaml, or set "
                f"{name.lower()} in your own file"
            )


def local_processes() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def processes_here() -> int:
    """Return the number of processes on this machine that share it: of this run, and of those beside it."""
    return local_processes() * int(os.environ.get(BESIDE, "1"))


def share_threads() -> None:
    """Give this process its share of the processors, unless the user has set how many threads it takes."""
    import torch

    if not _user_set_threads():
        torch.set_num_threads(max(1, processors() // processes_here()))


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one; a page given back must be mapped and cleared again.

    Does nothing where it is not glibc.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for trim_or_mmap_threshold in (-1, -3):
            mallopt(trim_or_mmap_threshold, 2**31 - 1)


def _user_set_threads() -> bool:
    """Whether OMP_NUM_THREADS is the user's: a launcher that finds none sets one, without knowing of quotas."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # `4,2` is for nested regions
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return threads.isdecimal() and int(threads) > 0
    launcher = psutil.Process(os.getppid())
    with suppress(psutil.Error):
        return "OMP_NUM_THREADS" in launcher.environ() or "--num_cpu_threads_per_process" in " ".join(
            launcher.cmdline()
        )
    return False


def processors() -> int:
    """Return the processors that this machine or container gives to its processes: a quota counts as whole ones."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas()])))


def _quotas() -> Iterator[float]:
    """Yield the processors allowed by each control group that this process is in, of version 1 or 2."""
    for folder in _control_groups():
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()  # "max 100000" where there is none
            yield int(quota) / int(period)
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # -1 where there is none
                yield int(quota) / int(period)


def _control_groups() -> Iterator[Path]:
    """Yield the folders of the groups of this process and of all above them; in a container the root is its own."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            root = Path(_CGROUP, controllers)
            place = root / path.lstrip("/")
            yield from (root, *(folder for folder in (place, *place.parents) if root in folder.parents))


def gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls each GPU of this machine that PyTorch can use."""
    if (_version("torch") or "").endswith("+cpu"):  # a build that can use none; asking takes seconds
        return []
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]  # itself it would hold the memory
    count = int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [name.strip() for name in named][:count] if named != [""] else list(map(str, range(count)))


def sharding_asked() -> str | None:
    """Return how the launcher was asked to divide the model among processes: FSDP, DEEPSPEED or None."""
    kinds = ("FSDP", "DEEPSPEED")
    return next((kind for kind in kinds if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("true", "1")), None)


def usable_bytes(device_type: str, local_processes: int) -> int:
    """Return the memory that one process may plan with: a whole GPU, or its share of half the machine.

    Of all there is and not of what is free, so that runs started one after the other get the same plan.
    """
    if device_type == "cuda":
        import torch

        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    limits = (Path(_CGROUP, name) for name in ("memory.max", "memory/memory.limit_in_bytes"))  # of a container
    allowed = [int(text) for file in limits if file.is_file() and (text := file.read_text().strip()).isdigit()]
    beside = int(os.environ.get(BESIDE, "1"))
    return min(psutil.virtual_memory().total, *allowed, 2**63) // 2 // local_processes // beside


def resident_bytes(device_type: str) -> int:
    """Return what this process holds now: allocated on the GPU, or resident on a CPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def reset_peak(device_type: str) -> None:
    """Start `peak_since_reset` anew."""
    if device_type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5")  # Linux: the high-water mark of resident memory becomes what it is now


def peak_since_reset(device_type: str) -> int:
    """Return the peak memory since `reset_peak`: allocated on the GPU, or resident; the whole run's where not Linux."""
    if device_type == "cuda" or not _STATUS.is_file():
        return peak_bytes(device_type)
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peak_bytes(device_type: str) -> int:
    """Return this process's peak memory in bytes: allocated on the GPU, or resident on a CPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # kilobytes on Linux


def reserved_bytes(device_type: str) -> int | None:
    """Return the most that PyTorch's allocator has held of the GPU, used or not; None on a CPU, which has no such."""
    if device_type != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_reserved()


def expandable_segments() -> None:
    """Have PyTorch's memory on a GPU grow in place, unless the user configured it: rows of many lengths leave no holes.

    To be called before PyTorch is imported, which reads it then (2.11 to 2.13).
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def hub_answers() -> bool:
    """Return whether the hub can be reached within three seconds; never in offline mode."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=3):
            return True
    except urllib.error.HTTPError:
        return True  # it answers
    except OSError:
        return False


def quiet_libraries() -> None:
    """Leave the screen to what this package says; a library's warning that matters is a check of ours.

    To be called before the libraries are imported.
    """
    if not sys.stderr.isatty():  # in a log file a bar is thousands of lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer that is made
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")  # theirs to each other
    warnings.filterwarnings("ignore", module="peft")  # what it would pass over is refused before
    warnings.filterwarnings("ignore", message="IProgress not found")  # of notebooks without widgets
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "Failed to load ..." of an optional kernel
