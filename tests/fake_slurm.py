"""Stands in for a Slurm cluster of one node: `sbatch`, `srun`, `scontrol requeue`, `scancel` and `sacct` on the PATH.

A job is a process of this machine, and what is known of it a file named after its id in the folder FAKE_SLURM. Called
as `python fake_slurm.py sbatch ...`; `install` writes the commands.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "sacct")


def install(folder: Path) -> dict[str, str]:
    """Write the commands into a folder, and return the variables with which a process finds them."""
    folder.mkdir(parents=True)
    for name in COMMANDS:
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        file.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def jobs() -> dict[str, dict[str, object]]:
    """Return what is known of each job: its process, its state and the variables that Slurm sets."""
    return {file.stem: json.loads(file.read_text()) for file in Path(os.environ["FAKE_SLURM"]).glob("*.json")}


def note(job: str, **facts: object) -> None:
    file = Path(os.environ["FAKE_SLURM"], f"{job}.json")
    known = json.loads(file.read_text()) if file.exists() else {}
    file.with_suffix(".new").write_text(json.dumps(known | facts))
    file.with_suffix(".new").replace(file)


def sbatch(script: str) -> None:
    """Start the script once, or once for each member of its array; members beyond its limit wait for one to end."""
    text = Path(script).read_text()
    array = re.search(r"--array=0-(\d+)%(\d+)", text)
    first = str(time.monotonic_ns() // 1000)  # submitit remembers for good how a job of a name has ended
    members = [f"{first}_{i}" for i in range(int(array[1]) + 1)] if array else [first]
    for job in members:
        note(job, state="PENDING", script=script, requeues=0)
    width = int(array[2]) if array else 1
    lanes = [members[i::width] for i in range(width)]
    for lane in lanes:
        subprocess.Popen(
            [sys.executable, __file__, "lane", *lane],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    print(f"Submitted batch job {first}")


def lane(*members: str) -> None:
    """Run members of an array one after the other, each again for as long as it is requeued."""
    for job in members:
        first, _, member = job.partition("_")
        ids = {"SLURM_JOB_ID": first, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
        if member:
            ids |= {"SLURM_ARRAY_JOB_ID": first, "SLURM_ARRAY_TASK_ID": member}
        while jobs()[job]["state"] in ("PENDING", "REQUEUED"):
            with subprocess.Popen(["bash", str(jobs()[job]["script"])], env={**os.environ, **ids}) as process:
                note(job, state="RUNNING")
                code = process.wait()
            if jobs()[job]["state"] == "RUNNING":
                note(job, state="COMPLETED" if code == 0 else "FAILED")


def srun(*words: str) -> None:
    """Become the command, with its output where --output and --error say."""
    flags = dict(itertools.pairwise(words))
    job = "_".join(filter(None, (os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID"))))
    for name, stream in (("--output", 1), ("--error", 2)):
        file = flags[name].replace("%A_%a", job).replace("%j", job).replace("%t", "0")
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    command = list(words[words.index(sys.executable) :])
    note(job, pid=os.getpid())
    os.execv(sys.executable, command)


def scontrol(_: str, job: str) -> None:
    note(job, state="REQUEUED", requeues=int(str(jobs()[job]["requeues"])) + 1)


def preempt(job: str) -> None:
    """Requeue a job that runs, and tell its process, as Slurm does with `PreemptMode=REQUEUE`."""
    scontrol("requeue", job)
    os.kill(int(str(jobs()[job]["pid"])), signal.SIGTERM)


def scancel(job: str) -> None:
    known = jobs()[job]
    note(job, state="CANCELLED")
    if known["state"] == "RUNNING":
        os.kill(int(str(known["pid"])), signal.SIGTERM)


def sacct(*_: str) -> None:
    print("JobID|State|NodeList")
    for job, known in jobs().items():
        print(f"{job}|{known['state']}|here")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
