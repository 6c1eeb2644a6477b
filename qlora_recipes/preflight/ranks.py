"""The processes of one run meet, agree on what they are about to do, and speak with one voice when it fails.

They talk through the store of their launcher, which is there before a process group is and after one has broken.
A rank is the number of a process among all, from 0 up; a node is a machine. Nothing here does anything in a run of one
process.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from qlora_recipes import environment
from qlora_recipes.errors import EXIT_CODE, SetupError, UsageError
from qlora_recipes.run.differences import differences, shortened

T = TypeVar("T")
LONGEST_WAIT = 300
"""Seconds for the first meeting, if `ddp_timeout` is not shorter: launchers start their processes together."""
_ROWS_WAIT = 24 * 3600  # seconds; other nodes may have more to download
_LAST_WORDS = 5  # seconds in which every rank that still runs notices that one does not
_LAUNCH = ("ACCELERATE_USE_", "ACCELERATE_MIXED_PRECISION", "FSDP_", "WORLD_SIZE")
_FILE_WAIT = 10  # seconds until a network folder shows a new file
_POLL = 0.05
_BROKEN = re.compile(r"gloo|nccl|c10d|TCPStore|(closed|reset) by peer", re.IGNORECASE)
_rounds = itertools.count()
_wait: float = LONGEST_WAIT


def several() -> bool:
    """Whether a launcher has started more than one process for this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _rank() -> int:
    return int(os.environ["RANK"])


def _everyone() -> range:
    return range(int(os.environ["WORLD_SIZE"]))


def _me() -> str:
    return f"rank {_rank()} (process {os.getpid()} on {socket.gethostname()})"


@functools.cache
def _store() -> Any:
    """Return the store of the launcher, or of rank 0 where the launcher has none."""
    import torch
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_wait)))
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise SetupError(
            f"{_me()} got no answer from rank 0 at {where} within {_wait:.0f} s. Start every process of the run at the "
            "same time, and give all nodes the address of the first, with a port that is free and open"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed = torch.distributed.PrefixStore  # type: ignore[attr-defined]  # public, and not in torch's annotations
    return prefixed(f"qlora-recipes/{attempt}", store)


# ---- Agreeing ----


def meet(facts: Mapping[str, Any], timeout: float) -> None:
    """Wait until every process of the run is there, and refuse a run whose processes differ in `facts`.

    `timeout`, in seconds, is the run's `ddp_timeout`.

    Raises:
        SetupError: when a process does not come, naming it.
        UsageError: when two processes have the same rank, or one differs in `facts` from rank 0.
    """
    if not several():
        return
    global _wait
    _wait = min(timeout, LONGEST_WAIT)
    me = f"process {os.getpid()} on {socket.gethostname()}"
    if (other := _store().compare_set(f"is rank {_rank()}", "", me).decode()) != me:
        raise UsageError(
            f"two processes have rank {_rank()}: {other}, and {me}. Give each node its own number from 0 up "
            "(--machine_rank of accelerate, --node_rank of torchrun)"
        )
    asked = {name: value for name, value in os.environ.items() if name.startswith(_LAUNCH)}
    agree({**facts, "launch": asked, "device": _device()})


def _device() -> str:
    import torch

    rank, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    return torch.cuda.get_device_name(rank) if rank < there else f"no GPU {rank}" if there else "cpu"


def agree(facts: Mapping[str, Any]) -> None:
    """Refuse a run whose processes differ in `facts`.

    Raises:
        UsageError: naming each rank that differs from rank 0, and in what.
    """
    if not several():
        return
    (host, first), *others = _exchange((socket.gethostname(), dict(facts)))
    lines = [
        f"  rank {rank} on {its_host}: {key} is {shortened(its)}, expected {shortened(expected)}"
        for rank, (its_host, its_facts) in enumerate(others, 1)
        for key, expected, its in differences(first, its_facts)
    ]
    if lines:
        more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
        raise UsageError(
            f"the processes of this run differ from rank 0 on {host}:\n" + "\n".join(lines[:12]) + more + "\n"
            "Start every node with the same command, files and package versions, on GPUs of one kind"
        )


def prove_shared(folder: Path) -> None:
    """Make sure that every process sees the run folder that rank 0 will write: each looks for a file of rank 0.

    Raises:
        SetupError: naming the ranks that do not see it.
    """
    if not several():
        return
    above = [folder.absolute(), *folder.absolute().parents]
    height = next(height for height, path in enumerate(above) if path.is_dir())
    name, file = f".qlora-recipes-{uuid.uuid4().hex}", None
    if _rank() == 0:
        file = above[height] / name
        file.touch(exist_ok=False)
    try:
        height, name = _exchange((height, name))[0]
        sees = wait_until((above[min(height, len(above) - 1)] / name).exists, _FILE_WAIT)
        without = [
            f"rank {rank} on {host}"
            for rank, (host, saw) in enumerate(_exchange((socket.gethostname(), sees)))
            if not saw
        ]
    finally:
        if file:
            file.unlink(missing_ok=True)
    if without:
        raise SetupError(
            f"{', '.join(without)}: the folder {folder} is not the one that rank 0 writes. Checkpoints are written and "
            "read by all nodes: give --output_dir a folder that every node sees under the same path, such as one on NFS"
        )


def once_per_node(make: Callable[[], T]) -> T:
    """Return what `make` makes, called by the first process of each node alone and read by its others from a file."""
    if not several():
        return make()
    first = _rank() - int(os.environ["LOCAL_RANK"])
    file = ""
    if first == _rank():
        made = make()
        if environment.local_processes() > 1:
            descriptor, file = tempfile.mkstemp(prefix="qlora-recipes-")
            with os.fdopen(descriptor, "wb") as stream:
                pickle.dump(made, stream)
    try:
        files = _exchange(file, _ROWS_WAIT)
        if first != _rank():
            with Path(files[first]).open("rb") as stream:
                made = cast(T, pickle.load(stream))  # of our own node's first process, in a file of ours alone
        _exchange(None)  # all have read it
    finally:
        if file:  # rows of the user's, not to be left behind by a run that fails
            Path(file).unlink()
    return made


def _exchange(mine: Any, seconds: float | None = None) -> list[Any]:
    """Return what every rank gave, in the order of ranks; all ranks call this the same number of times.

    Ends the process, quietly and with the exit code of an error, when another has failed meanwhile and said so.
    """
    seconds = _wait if seconds is None else seconds
    store, this = _store(), next(_rounds)
    keys = {rank: f"round {this} of {rank}" for rank in _everyone()}
    store.set(keys[_rank()], json.dumps(mine, default=str))
    if not wait_until(lambda: store.check(["failed"]) or store.check(list(keys.values())), seconds):
        absent = [f"rank {rank}" for rank, key in keys.items() if not store.check([key])]
        raise SetupError(
            f"{_me()} waited {seconds:.0f} s for {', '.join(absent)} of {len(keys)}: not started, or it hangs. Start "
            "every node with its own number and the same number of processes, and look at the log of that one"
        )
    if store.check(["failed"]):
        raise SystemExit(EXIT_CODE)
    return [json.loads(store.get(key)) for key in keys.values()]


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Return whether something holds, asked again and again for so many seconds."""
    until = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < until:
        time.sleep(_POLL)
    return found


# ---- Failing ----


def is_lost_process(error: BaseException) -> bool:
    """Whether a library's error says that another process of this run is gone, or does not answer."""
    import torch

    text = str(error).partition("\n")[0]
    return several() and (isinstance(error, torch.distributed.DistError) or bool(_BROKEN.search(text)))


def lost_process(error: BaseException) -> SetupError:
    """Return what to say of an error that `is_lost_process`: which ranks do not answer, once the others have."""
    absent: list[int] = []
    with suppress(RuntimeError, SetupError):  # the store may be gone with rank 0
        store = _store()
        keys = {rank: f"stopped {rank}" for rank in _everyone()}
        store.set(keys[_rank()], "")
        wait_until(lambda: store.check(list(keys.values())), _LAST_WORDS)
        absent = [rank for rank, key in keys.items() if not store.check([key])]
    who = [store.get(f"is rank {rank}").decode() for rank in absent if store.check([f"is rank {rank}"])]
    named = ", ".join(f"rank {rank} ({where})" for rank, where in zip(absent, who, strict=False)) or "another process"
    return SetupError(
        f"{named} is gone or hangs, and the run ends ({shortened(' '.join(str(error).split()), 160)}). The checkpoints "
        "that were finished are kept. Start every process again with the same command and --resume"
    )


def fails_first() -> bool:
    """Whether this process is the first of its run that fails, so that its message is the one that is printed."""
    if not several():
        return True
    global _wait
    _wait = min(_wait, _LAST_WORDS)
    try:
        store = _store()
        store.set(f"stopped {_rank()}", "")
        return int(store.add("failed", 1)) == 1
    except (RuntimeError, SetupError):  # no store, or gone with rank 0
        return os.environ.get("LOCAL_RANK", "0") == "0"
