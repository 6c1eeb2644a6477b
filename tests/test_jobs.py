"""Jobs of a benchmark side by side, on this machine and on a cluster: each place used, no work lost, one error for all.

What trains is a script of a few lines, which saves at a signal and resumes as a training does.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_slurm
import pytest
from rich.console import Console

from qlora_recipes import environment
from qlora_recipes.errors import CheckError, RunFolderError, SetupError, UsageError
from qlora_recipes.experiments.benchmark.jobs import Job, SideBySide
from qlora_recipes.experiments.benchmark.slurm import Slurm, read_options
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.signals import Stopped, StopSignals

TRAINING = """
import json, os, signal, sys, time
from pathlib import Path

folder, received = Path(sys.argv[1]), []
for which in (signal.SIGTERM, signal.SIGINT):
    signal.signal(which, lambda number, frame: received.append(number))
folder.mkdir(parents=True, exist_ok=True)
(folder / "started.json").write_text(str(os.getpid()))
if (folder.parent / f"{folder.name}-breaks").exists():
    sys.exit("error: the disk is full")
while not (folder.parent / f"{folder.name}-ends").exists():
    time.sleep(0.02)
    if received:
        time.sleep(0.5)
        (folder / "saved").touch()
        sys.exit(128 + received[0])
names = ("CUDA_VISIBLE_DEVICES", "QLORA_RECIPES_JOBS")
(folder / "run.json").write_text(json.dumps(["--resume" in sys.argv, *map(os.environ.get, names)]))
"""

FULL = r"training a ended with exit code 1\.(.*\n)*  error: the disk is full"


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """Return a function that makes a job, which ends at once unless it is to wait."""
    (tmp_path / "training.py").write_text(TRAINING)

    def make(name: str, *, waits: bool = False) -> Job:
        folder = tmp_path / name
        if not waits:
            finish(tmp_path, name)
        words = (str(tmp_path / "training.py"), str(folder))
        return Job(name, words, tmp_path / "logs" / f"{name}.log", RunFolder(folder), trains=True)

    return make


def finish(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}-ends").touch()


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def left(job: Job) -> list[str | bool | None]:
    """Return what a job left: whether it resumed, its GPUs, and how many share the machine."""
    found: list[str | bool | None] = json.loads((job.folder.path / "run.json").read_text())
    return found


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


# On this machine


def test_each_has_a_gpu_of_its_own(job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ["4", "GPU-5", "6"])
    jobs = [job(name, waits=True) for name in "abc"]
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(SideBySide(2).run, jobs, console())
        wait_for(lambda: all(job.folder.started.exists() for job in jobs[:2]))
        assert not jobs[2].folder.started.exists()  # no more than two at a time
        finish(tmp_path, *"cba")
        done.result()
    assert {str(left(job)[1]) for job in jobs} == {"4", "GPU-5"} != {str(left(jobs[0])[1])}
    assert {left(job)[2] for job in jobs} == {"2"}
    with pytest.raises(UsageError, match="--jobs: got 4, expected up to 3: one for each GPU"):
        SideBySide(4).run(jobs, console())


def test_alone_nothing_is_set(job: Callable[..., Job]) -> None:
    SideBySide(1).run([job("a")], console())
    assert left(job("a")) == [False, os.environ.get("CUDA_VISIBLE_DEVICES"), None]


def test_without_gpus_the_processors_and_the_memory_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = environment.usable_bytes("cpu", 1)
    monkeypatch.setenv(environment.BESIDE, "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert environment.processes_here() == 6
    assert environment.usable_bytes("cpu", 1) == alone // 2


@pytest.mark.parametrize(("named", "count", "found"), [(None, 2, "0 1"), ("3,1", 2, "3 1"), ("", 0, ""), ("-1", 0, "")])
def test_gpus_are_named_as_cuda_names_them(
    named: str | None, count: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, 0, f"{count}\n")

    monkeypatch.setattr(subprocess, "run", counted)
    monkeypatch.setattr(environment, "_version", lambda _: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert environment.gpus() == found.split()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", list)


@pytest.mark.usefixtures("no_gpu")
def test_what_runs_beside_a_failure_is_finished_and_nothing_more_is_begun(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    a, b, c = (job(name, waits=name == "b") for name in "abc")
    (tmp_path / "a-breaks").touch()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(SideBySide(2).run, [a, b, c], said := console())
        wait_for(lambda: b.folder.started.exists() and a.log.exists() and "full" in a.log.read_text())
        time.sleep(0.3)
        finish(tmp_path, "b")
        with pytest.raises(
            CheckError, match=r"training a ended with exit code 1\.(.*\n)*  error: the disk is full"
        ) as it:
            done.result()
    assert str(it.value).count("run the same command again") == 1
    assert b.folder.finished and not c.folder.started.exists()
    assert "b: trained in" in said.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
    (tmp_path / "a-breaks").unlink()
    SideBySide(2).run([a, c], console())
    assert [left(each)[0] for each in (a, b, c)] == [True, False, False]


@pytest.mark.usefixtures("no_gpu")
def test_a_killed_training_is_resumed_by_the_same_command(job: Callable[..., Job], tmp_path: Path) -> None:
    a, b = job("a", waits=True), job("b")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(SideBySide(2).run, [a, b], console())
        wait_for(lambda: a.folder.started.exists() and a.folder.started.read_text())
        os.kill(int(a.folder.started.read_text()), signal.SIGKILL)
        with pytest.raises(CheckError, match="training a ended with exit code -9"):
            done.result()
    assert b.folder.finished
    finish(tmp_path, "a")
    SideBySide(2).run([a], said := console())
    assert left(a)[0] and "a: resuming its unfinished run" in said.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_gpu")
def test_a_signal_lets_all_of_them_save(job: Callable[..., Job]) -> None:
    jobs = [job(name, waits=True) for name in "abc"]

    def interrupt() -> None:
        wait_for(lambda: all(job.folder.started.exists() for job in jobs[:2]))
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals(), pytest.raises(Stopped):
        threading.Thread(target=interrupt).start()
        SideBySide(2).run(jobs, console())
    assert [(job.folder.path / "saved").exists() for job in jobs] == [True, True, False]


# On a cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    pytest.importorskip("submitit")
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    return Slurm(3, {"time": "240", "partition": "gpu"}, tmp_path / "logs" / "slurm")


def process_of(member: int) -> int | None:
    """Return the process that Slurm knows as a member of the array, once it runs."""
    return next((known.get("pid") for job, known in fake_slurm.jobs().items() if job.endswith(f"_{member}")), None)


def test_a_job_goes_on_after_its_time_and_after_a_preemption(
    job: Callable[..., Job], cluster: Slurm, tmp_path: Path
) -> None:
    jobs = [job(name, waits=True) for name in ("plain", "late", "preempted")]
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(cluster.run, jobs, said := console())
        wait_for(lambda: all(job.folder.started.exists() for job in jobs))
        time.sleep(0.2)
        os.kill(process_of(1), signal.SIGUSR2)  # 120 s before its time is over
        fake_slurm.preempt(next(name for name in fake_slurm.jobs() if name.endswith("_2")))
        wait_for(lambda: all((job.folder.path / "saved").exists() for job in jobs[1:]))
        finish(tmp_path, "plain", "late", "preempted")
        done.result(timeout=60)
    assert [left(each)[0] for each in jobs] == [False, True, True]
    wait_for(lambda: {known["state"] for known in fake_slurm.jobs().values()} == {"COMPLETED"})
    assert sorted(known["requeues"] for known in fake_slurm.jobs().values()) == [0, 1, 1]
    script = next((tmp_path / "logs" / "slurm").rglob("*_submission.sh")).read_text()
    for line in (
        "--array=0-2%3",
        "--partition=gpu",
        "--gpus-per-node=1",
        "--requeue",
        "--signal=USR2@120",
        "--time=240",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "plain: trained by job" in said.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO


def test_a_job_that_fails_leaves_the_others_alone(job: Callable[..., Job], cluster: Slurm, tmp_path: Path) -> None:
    a, b = job("a"), job("b")
    (tmp_path / "a-breaks").touch()
    with pytest.raises(CheckError, match=FULL):
        cluster.run([a, b], console())
    assert b.folder.finished


def test_a_signal_cancels_the_jobs_which_save(job: Callable[..., Job], cluster: Slurm) -> None:
    a, b = job("a", waits=True), job("b", waits=True)

    def interrupt() -> None:
        wait_for(lambda: a.folder.started.exists() and b.folder.started.exists())
        with pytest.raises(RunFolderError, match=r"jobs of an earlier call still run: .*_0.*scancel"):
            cluster.run([a], console())
        os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals(), pytest.raises(Stopped), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(interrupt)
        cluster.run([a, b], console())
    asked.result()
    wait_for(lambda: all((each.folder.path / "saved").exists() for each in (a, b)))
    assert {known["state"] for known in fake_slurm.jobs().values()} == {"CANCELLED"}


def test_a_cluster_that_takes_no_jobs_is_one_error(
    job: Callable[..., Job], cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm" / "sbatch").write_text("#!/bin/sh\necho 'Invalid account' >&2\nexit 1\n")
    with pytest.raises(SetupError, match="Slurm takes no jobs: Invalid account"):
        cluster.run([job("a")], console())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match='Could not detect "srun"'):
        cluster.run([job("a")], console())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu"], "--slurm: got 'gpu', expected options of sbatch"),
        (["partition=gpu"], "--slurm: time: got None, expected the minutes"),
        (["time=4:00:00"], "--slurm: time: got 4:00:00, expected the minutes"),
    ],
)
def test_options_that_cannot_be_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_options(words)
    assert read_options(["--time=5", "cpus-per-task=4"]) == {"time": "5", "cpus_per_task": "4"}
