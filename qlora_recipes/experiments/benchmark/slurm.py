"""Runs the trainings and scorings of a benchmark as jobs of a Slurm cluster, by submitit.

The folder of the benchmark must be shared by all nodes. Knows nothing of what the jobs do.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_recipes.errors import RunFolderError, SetupError, UsageError
from qlora_recipes.experiments.benchmark.jobs import STOPPED, Job, failure_of, stop

if TYPE_CHECKING:
    import subprocess

    from submitit import SlurmExecutor
    from submitit.helpers import DelayedSubmission

_SAVING = 120  # seconds before its time is over in which a training saves its step; a user may say otherwise
_REQUEUES = 100  # of a job whose time was over, each of which resumes; submitit's 3 are few for short time limits


def read_options(words: Sequence[str]) -> dict[str, str]:
    """Return options of sbatch by name, from words such as `partition=gpu`.

    Raises:
        UsageError: for another word, or when the time limit is not given in minutes.
    """
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if not (name and equals and value):
            raise UsageError(f"--slurm: got {word!r}, expected options of sbatch such as partition=gpu time=240")
        options[name.replace("-", "_")] = value
    if not options.get("time", "").isdecimal():
        raise UsageError(
            f"--slurm: time: got {options.get('time')}, expected the minutes that a job may run before it is requeued "
            "and resumes, such as time=240"
        )
    return options


@dataclass(frozen=True)
class Slurm:
    """Jobs in an array of Slurm's, so many at a time, with one GPU each unless the options say otherwise.

    A job that is preempted, or whose time is over, saves its step, is requeued and resumes.
    """

    workers: int
    options: Mapping[str, str]
    """Options of sbatch; `time` in minutes."""
    folder: Path
    """What submitit writes."""

    several = apart = True

    def run(self, jobs: Sequence[Job], console: Console) -> None:
        """Submit jobs and wait for all of them; one that fails leaves the others alone.

        Raises:
            SetupError: when submitit or Slurm is not there, or sbatch refuses.
            RunFolderError: when jobs of an earlier call still run.
            CheckError: when jobs fail, with the end of what they said.
        """
        if not jobs:
            return
        try:
            from submitit.core.utils import FailedJobError, UncompletedJobError
            from submitit.helpers import as_completed
        except ImportError as error:
            raise SetupError("--slurm needs submitit. Run: pip install 'qlora-recipes[cluster]'") from error
        self._check_none_runs()
        try:
            submitted = self._executor().submit_array([_OnNode(job) for job in jobs])
        except (RuntimeError, FailedJobError, OSError) as error:
            raise SetupError(f"Slurm takes no jobs: {error}") from error
        console.print(f"{len(jobs)} jobs submitted: {', '.join(job.job_id for job in submitted)}", highlight=False)
        of = {each.job_id: job for each, job in zip(submitted, jobs, strict=True)}
        failed: dict[Job, str] = {}
        try:
            for ended in as_completed(submitted, poll_frequency=1):
                job, how = of[ended.job_id], "no result"
                try:
                    code = ended.result()
                    how = f"exit code {code}"
                except (FailedJobError, UncompletedJobError) as error:
                    code, how = 1, f"{ended.state}: {str(error).strip().splitlines()[-1]}"
                if job.succeeded(code):
                    console.print(f"{job.name}: {job.verbs[1]} by job {ended.job_id}", highlight=False)
                else:
                    failed[job] = how
        except BaseException:
            for left in submitted:
                if not left.done():
                    left.cancel(check=False)
            list(as_completed(submitted, poll_frequency=1))  # until each has saved its step
            raise
        if failed:
            raise failure_of(failed)

    def _check_none_runs(self) -> None:
        """Refuse to start jobs beside those of an earlier call, which may be in the same run folders."""
        import submitit

        known = [file.name.removesuffix("_submitted.pkl") for file in self.folder.rglob("*_submitted.pkl")]
        if running := [each for each in known if not submitit.SlurmJob(self.folder, each).done(force_check=True)]:
            raise RunFolderError(
                f"jobs of an earlier call still run: {', '.join(running)}. Wait for them, or end them: scancel "
                f"{' '.join(running)}. Where Slurm no longer knows them, remove {self.folder}"
            )

    def _executor(self) -> SlurmExecutor:
        import submitit

        self.folder.mkdir(parents=True, exist_ok=True)
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=_REQUEUES)
        given: dict[str, Any] = {"requeue": True, "job_name": "qlora-recipes"}
        if not any(name.startswith(("gpus", "gres")) for name in self.options):
            given["gpus_per_node"] = 1
        given |= {name: value for name, value in self.options.items() if name != "time"}
        executor.update_parameters(
            time=int(self.options["time"]),
            array_parallelism=self.workers,
            signal_delay_s=_SAVING,
            additional_parameters=given,
        )
        return executor


class _OnNode:
    """What a node does: start the job, pass signals on, and come back to it after a requeue."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        self._process = process = self._job.start()
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # a preemption, or scancel
        code = process.wait()
        if code in STOPPED:
            raise SystemExit(code)  # it has no result yet: Slurm requeues it, or was told to end it
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Let the training save its step; submitit calls this when the time is over, and requeues the job."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            stop({self._process: self._job.launched})
        return DelayedSubmission(_OnNode(self._job))
