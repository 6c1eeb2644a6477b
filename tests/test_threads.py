"""How many threads a process takes: what the user set, or its share of what the machine or its container gives."""

from __future__ import annotations

import importlib
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_recipes import environment
from qlora_recipes.commands import quick_imports

Groups = Callable[..., None]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Return a function that writes the control groups of a machine with sixteen processors."""

    def write(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(membership)
        for name, text in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    monkeypatch.setattr(environment, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(environment, "_CGROUP", str(tmp_path / "cgroup"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return write


# What /proc/self/cgroup says; files of control groups; the processors that are left of sixteen.
QUOTAS: dict[str, tuple[str, dict[str, str], int]] = {
    "no groups": ("", {}, 16),
    "version 2, none": ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
    "version 2, a container": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "version 2, a service": ("0::/user.slice/run.service\n", {"user.slice/run.service/cpu.max": "400000 100000\n"}, 4),
    "version 2, the group above": ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
    "version 2, a part of one": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "version 2, one and a half": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
    "version 2, more than there are": ("0::/\n", {"cpu.max": "6400000 100000\n"}, 16),
    "version 2, broken": ("0::/\n", {"cpu.max": "many\n"}, 16),
    "version 1, none": ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
    "version 1, a container": (
        "4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n",  # the container sees its own group as the root
        {"cpu,cpuacct/cpu.cfs_quota_us": "500000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        5,
    ),
    "version 1, a group": (
        "3:cpu:/jobs/7\n",
        {"cpu/jobs/7/cpu.cfs_quota_us": "600000\n", "cpu/jobs/7/cpu.cfs_period_us": "100000\n"},
        6,
    ),
    "both versions": ("3:cpuacct:/\n1:name=systemd:/x\n0::/x\n", {"x/cpu.max": "700000 100000"}, 7),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_a_quota_is_kept(groups: Groups, case: str) -> None:
    membership, files, expected = QUOTAS[case]
    groups(membership, files)
    assert environment.processors() == expected


def test_affinity_is_kept(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    groups("0::/\n", {"cpu.max": "800000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 4, 5}, raising=False)
    assert environment.processors() == 3


@pytest.fixture
def threads(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return what PyTorch is told, in a container with eight processors."""
    import torch

    told: list[int] = []
    groups("0::/\n", {"cpu.max": "800000 100000\n"})
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(environment, "share_threads", _share_threads)
    return told


# conftest.py takes the function away from the other tests; the module as it was imported has it.
_SPEC = importlib.util.spec_from_file_location("environment_as_written", environment.__file__)
assert _SPEC is not None and _SPEC.loader is not None
AS_WRITTEN = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(AS_WRITTEN)


def _share_threads() -> None:
    AS_WRITTEN._OWN_GROUPS, AS_WRITTEN._CGROUP = environment._OWN_GROUPS, environment._CGROUP
    AS_WRITTEN.share_threads()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, [8]),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, [4]),  # of four machines
        ({"LOCAL_WORLD_SIZE": "16"}, [1]),
        ({"OMP_NUM_THREADS": "3"}, []),  # PyTorch has read it
        ({"OMP_NUM_THREADS": "1"}, []),
        ({"OMP_NUM_THREADS": "4,2"}, []),
        ({"OMP_NUM_THREADS": "many"}, [8]),
        ({"OMP_NUM_THREADS": "0"}, [8]),
        ({"OMP_NUM_THREADS": "", "LOCAL_WORLD_SIZE": "2"}, [4]),
    ],
)
def test_what_the_user_set_wins(
    threads: list[int], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: list[int]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.share_threads()
    assert threads == expected


LAUNCHER = """
import os, subprocess, sys
environment = {**os.environ, "OMP_NUM_THREADS": "5", "ACCELERATE_MIXED_PRECISION": "no"}
subprocess.run([sys.executable, "-c", sys.argv[1]], env=environment, check=True)
"""
PROGRAM = "from qlora_recipes import environment; print(environment._user_set_threads())"


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({}, [], "False"),  # the launcher's own choice
        ({"OMP_NUM_THREADS": "5"}, [], "True"),
        ({}, ["--num_cpu_threads_per_process", "5"], "True"),
    ],
)
def test_what_a_launcher_set_is_not_the_users(variables: dict[str, str], flags: list[str], expected: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    launch = [sys.executable, "-c", LAUNCHER, PROGRAM, *flags]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(launch, env=inherited | variables | paths, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_what_bitsandbytes_compiles_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    plain = quick_imports._compiled_when_called(lambda x: x + 1)
    with_options = quick_imports._compiled_when_called(dynamic=False)(lambda x: x + 1)
    assert not compiled
    assert [plain(1), plain(1), with_options(1)] == [2, 2, 2]
    assert compiled == [{}, {"dynamic": False}]


def test_bitsandbytes_still_has_the_compiler_loaded_when_it_is_imported() -> None:
    """When this fails, `_compiled_when_called` can go."""
    from bitsandbytes.backends.default import ops

    assert "torch.compile(fn" in inspect.getsource(ops._try_torch_compile)


QUICK = """
import gc, sys
from qlora_recipes.commands.quick_imports import quick_imports
with quick_imports():
    import qlora_recipes.training.train
print(gc.isenabled(), gc.get_freeze_count() > 100_000, *({"torch._inductor.compile_fx", "scipy"} & sys.modules.keys()))
"""


def test_what_no_training_needs_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


FREED = """
import ctypes, psutil
from qlora_recipes import environment
for keep in (lambda: None, environment.keep_freed_memory):
    keep()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    block = ctypes.c_void_p(libc.malloc(2**26))
    ctypes.memset(block, 1, 2**26)
    held = psutil.Process().memory_info().rss
    libc.free(block)
    print(held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_memory_that_a_step_frees_is_kept_for_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 2**25 > after
