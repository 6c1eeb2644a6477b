"""Runs the trainings and scorings of a benchmark on this machine, one or several at a time, each in a fresh process.

Several at a time have a GPU each, or share the processors. Knows nothing of what they do.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import psutil
from rich.console import Console

from qlora_recipes import environment
from qlora_recipes.errors import CheckError, UsageError
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.signals import Stopped

STOPPED = {128 + number: number for number in (signal.SIGTERM, signal.SIGINT)}  # exit codes of a training
_LAST_LINES = 12
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Job:
    """One command of a benchmark: it trains a run or scores it."""

    name: str
    words: tuple[str, ...]
    """What Python is called with."""
    log: Path
    folder: RunFolder
    """The run; it is finished once the job is."""
    trains: bool
    launched: bool = False
    """Whether a launcher stands between."""

    @property
    def verbs(self) -> tuple[str, str]:
        return ("training", "trained") if self.trains else ("scoring", "evaluated")

    @property
    def resumes(self) -> bool:
        """Whether an earlier attempt at this training is to be resumed."""
        return self.trains and self.folder.started.exists()

    def start(self, **variables: str) -> subprocess.Popen[bytes]:
        """Start it, with everything it says in the log, and these variables beside the environment's."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as stream:
            return subprocess.Popen(
                [sys.executable, *self.words, *(["--resume"] if self.resumes else [])],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                preexec_fn=_end_with_parent,
                start_new_session=True,  # or Ctrl-C reaches it too, and what `stop` sends is its second signal
            )

    def succeeded(self, code: int) -> bool:
        """Whether it has left what it was to make."""
        return code == 0 and self.folder.finished

    def failure(self, how: str) -> str:
        """Say that it ended without a result, and what it said last."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        lines = [f"  {line}" for line in text.splitlines() if line.strip()][-_LAST_LINES:]
        said = "\n".join([f"Its last lines (all of them are in {self.log}):", *lines])
        return f"{self.verbs[0]} {self.name} ended with {how}. {said}"


class Engine(Protocol):
    """What runs jobs."""

    @property
    def several(self) -> bool:
        """Whether jobs run side by side."""

    @property
    def workers(self) -> int:
        """How many jobs run at a time."""

    @property
    def apart(self) -> bool:
        """Whether every scoring has a process of its own; else they are dealt out to as many as there are workers."""

    def run(self, jobs: Sequence[Job], console: Console) -> None:
        """Run jobs, each to its end, and raise one error for all that failed."""


@dataclass(frozen=True)
class SideBySide:
    """Jobs on this machine, so many at a time, by threads of `concurrent.futures` that wait for a process each.

    Not by submitit's local executor: it starts all jobs at once, and kills them a second after a signal, unsaved.
    """

    workers: int = 1

    @property
    def several(self) -> bool:
        return self.workers > 1

    @property
    def apart(self) -> bool:
        """Without GPUs they have not: to import the libraries for each takes as long as scoring on a core."""
        return self.several and bool(self.gpus)

    @cached_property
    def gpus(self) -> list[str]:
        """What CUDA_VISIBLE_DEVICES calls each GPU; asking takes seconds."""
        return environment.gpus()

    def run(self, jobs: Sequence[Job], console: Console) -> None:
        """Run jobs, as many at a time as there are workers; after a failure those that run are let finish.

        Raises:
            UsageError: for more workers than GPUs.
            CheckError: when a job fails, with the end of what it said.
            Stopped: when a job, or this process, was ended by a signal; every job has saved its step by then.
        """
        places: SimpleQueue[dict[str, str]] = SimpleQueue()
        for place in self._places(jobs):
            places.put(place)
        crew = _Crew(console, places)
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = {pool.submit(crew.work, job) for job in jobs}
            try:
                with console.status("") if console.is_terminal else nullcontext() as status:
                    while waiting:
                        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                        if status:
                            status.update("\n".join(f"{job.name}: {_last_step(job)}" for job in list(crew.running)))
            finally:
                crew.stop()
        _report(crew.codes)

    def _places(self, jobs: Sequence[Job]) -> list[dict[str, str]]:
        """Return the variables of each worker: which GPU is its own, and how many share the machine."""
        if self.workers == 1 or not jobs:
            return [{}]
        shared = {environment.BESIDE: str(self.workers)}
        gpus = self.gpus
        if 0 < len(gpus) < self.workers:
            raise UsageError(f"--jobs: got {self.workers}, expected up to {len(gpus)}: one for each GPU")
        each = len(gpus) // self.workers if all(job.launched for job in jobs) else 1
        split = [",".join(gpus[i * each : (i + 1) * each]) for i in range(self.workers)]
        return [{**shared, "CUDA_VISIBLE_DEVICES": own} if gpus else shared for own in split]


class _Crew:
    """The jobs that run, and how those that ran have ended."""

    def __init__(self, console: Console, places: SimpleQueue[dict[str, str]]) -> None:
        self.running: dict[Job, subprocess.Popen[bytes]] = {}
        self.codes: dict[Job, int] = {}
        self._console, self._places = console, places
        self._ends, self._lock = False, threading.Lock()

    def work(self, job: Job) -> None:
        """Run one job to its end, unless another has failed or all are to stop."""
        place = self._places.get()
        try:
            with self._lock:
                if self._ends:
                    return
                if job.resumes:
                    self._say(f"{job.name}: resuming its unfinished run")
                started = time.monotonic()
                self.running[job] = process = job.start(**place)
            self.codes[job] = process.wait()
            del self.running[job]
        finally:
            self._places.put(place)
        if job.succeeded(self.codes[job]):
            self._say(f"{job.name}: {job.verbs[1]} in {time.monotonic() - started:.0f} s")
        else:
            self._ends = True

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def stop(self) -> None:
        """Start nothing more, let every training save its running step, and wait for all."""
        with self._lock:
            self._ends = True
        stop({process: job.launched for job, process in list(self.running.items())})


def _report(codes: dict[Job, int]) -> None:
    """Raise for jobs that ended without a result."""
    failed = {job: code for job, code in codes.items() if not job.succeeded(code)}
    broken = [job for job, code in failed.items() if code not in STOPPED]
    if broken:
        raise failure_of({job: f"exit code {failed[job]}" for job in broken})
    for code in failed.values():
        raise Stopped(signal.Signals(STOPPED[code]), None)


def failure_of(failed: dict[Job, str]) -> CheckError:
    """Return the one error for jobs that failed, each with how it ended."""
    said = "\n".join(job.failure(how) for job, how in failed.items())
    anew = " ".join(str(job.folder.path) for job in failed if job.trains)
    fix = "Fix that and run the same command again; what is finished is kept."
    return CheckError(f"{said}\n{fix}" + (f" To train this run anew, remove {anew}" if anew else ""))


def stop(processes: dict[subprocess.Popen[bytes], bool]) -> None:
    """Let trainings save their running step and end; each has whether it is behind a launcher.

    accelerate's launcher of one process ends at once and leaves the training to itself, so that is told and waited for
    too; its launcher of several starts each in a session of its own, and tells them.
    """
    told: list[psutil.Process] = []
    for process, launched in processes.items():
        with suppress(psutil.NoSuchProcess):  # it has ended
            first = psutil.Process(process.pid)
            behind = first.children() if launched else []
            family = [first, *(child for child in behind if os.getsid(child.pid) == process.pid)]
            process.terminate()
            for child in family[1:]:
                child.terminate()
            told += family
    while any(map(_runs, told)):  # not process.wait(), for which another thread may be waiting
        time.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_with_parent() -> None:
    """End a training when the benchmark is killed: two of them must never write into one folder."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_step(job: Job) -> str:
    if not job.trains:
        return "scoring"
    try:
        rows = [json.loads(line) for line in job.folder.metrics.read_text(encoding="utf-8").splitlines()]
        logged = [row for row in rows if "loss" in row]
        return f"step {logged[-1]['step']}, loss {logged[-1]['loss']:.3f}"
    except (OSError, ValueError, IndexError):
        return "loading"
