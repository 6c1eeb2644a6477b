"""Trains the arms of a benchmark, each in a fresh process, and keeps what is finished. Knows nothing of scores."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console

from qlora_recipes.errors import CheckError
from qlora_recipes.experiments.benchmark.plan import Arm, Plan, check_trained
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.signals import Stopped

_LAST_LINES = 12
_PR_SET_PDEATHSIG = 1
_STOPPED = {128 + number: number for number in (signal.SIGTERM, signal.SIGINT)}  # exit codes of a training


def train_missing(plan: Plan, console: Console, *, launch: Sequence[str] | None = None) -> None:
    """Train every arm that has no receipt; an unfinished run resumes from its newest intact checkpoint.

    Raises:
        RunFolderError: when a finished run was trained with other settings.
        CheckError: when a training fails, with the end of what it said; so does resuming one of other settings.
        Stopped: when a training was ended by a signal.
    """
    for arm in plan.arms:
        if arm.folder.finished:
            check_trained(arm)
    for arm in plan.arms:
        if not arm.folder.finished:
            _train(plan, arm, console, launch)


def _train(plan: Plan, arm: Arm, console: Console, launch: Sequence[str] | None) -> None:
    argv = list(arm.argv)
    if arm.folder.started.exists():
        console.print(f"{arm.name}: resuming its unfinished run", highlight=False)
        argv.append("--resume")
    log = plan.output / "logs" / f"{arm.folder.path.name}.log"
    log.parent.mkdir(exist_ok=True)
    launcher = ["-m", "accelerate.commands.launch", *launch] if launch is not None else []
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "qlora_recipes.cli", "train", str(plan.recipe_file), *argv],
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,
            start_new_session=True,  # or Ctrl-C reaches it too, and what `_stop` sends is its second signal
        )
        try:
            _watch(process, arm, console)
        finally:
            if process.poll() is None:
                _stop(process, launched=launch is not None)
    if process.returncode in _STOPPED:
        raise Stopped(_STOPPED[process.returncode], None)
    if process.returncode != 0 or not arm.folder.finished:
        raise CheckError(_failure(arm, process.returncode, log))
    console.print(f"{arm.name}: trained in {time.monotonic() - started:.0f} s", highlight=False)


def _stop(process: subprocess.Popen[bytes], *, launched: bool) -> None:
    """Let a training save its running step and end.

    accelerate's launcher of one process ends at once and leaves the training to itself, so that is told and waited for
    too; its launcher of several starts each in a session of its own, and tells them.
    """
    family = psutil.Process(process.pid).children() if launched else []
    trainings = [child for child in family if os.getsid(child.pid) == process.pid]
    process.terminate()
    for training in trainings:
        training.terminate()
    process.wait()
    while any(map(_runs, trainings)):
        time.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_with_parent() -> None:
    """End a training when the benchmark is killed: two of them must never write into one folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _watch(process: subprocess.Popen[bytes], arm: Arm, console: Console) -> None:
    """Wait, and show the last logged step on a terminal."""
    if not console.is_terminal:
        process.wait()
        return
    with console.status(f"{arm.name}: starting") as status:
        while process.poll() is None:
            status.update(f"{arm.name}: {_last_step(arm.folder)}")
            time.sleep(0.5)


def _last_step(folder: RunFolder) -> str:
    try:
        rows = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
        logged = [row for row in rows if "loss" in row]
        return f"step {logged[-1]['step']}, loss {logged[-1]['loss']:.3f}"
    except (OSError, ValueError, IndexError):
        return "loading"


def _failure(arm: Arm, code: int, log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])
    return (
        f"training {arm.name} ended with exit code {code}. Its last lines (all of them are in {log}):\n{said}\n"
        "Fix that and run the same command again; what is finished is kept. To train this run anew, remove "
        f"{arm.folder.path}"
    )
