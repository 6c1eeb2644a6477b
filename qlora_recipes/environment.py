"""The machine and what is installed on it: package versions, git state, threads and memory. Knows nothing of runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from qlora_recipes.errors import SetupError

_DISTRIBUTION = "qlora-recipes"
_CGROUP = "/sys/fs/cgroup"
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RECORDED = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "lm-eval", "evaluate",
    "tokenizers", "safetensors", "numpy",
)  # fmt: skip


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
    return f"Run: pip install -c constraints.txt {' '.join(repr(str(need)) for need in needs)}"


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


def share_threads(processes: int) -> None:
    """Give each local process its share of the cores; `accelerate launch` leaves a CPU run with one thread."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // processes))


def is_sharded() -> bool:
    """Whether `accelerate launch` divides the model among processes, by FSDP or DeepSpeed."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def usable_bytes(device_type: str, local_processes: int) -> int:
    """Return the memory that one process may plan with: a whole GPU, or its share of half the machine.

    Of all there is and not of what is free, so that runs started one after the other get the same plan.
    """
    if device_type == "cuda":
        import torch

        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    limits = (Path(_CGROUP, name) for name in ("memory.max", "memory/memory.limit_in_bytes"))  # of a container
    allowed = [int(text) for file in limits if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min(psutil.virtual_memory().total, *allowed, 2**63) // 2 // local_processes


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
