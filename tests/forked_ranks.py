"""Several processes of one run, forked from the test: what a launcher does, without its seconds of imports."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.distributed import TCPStore

from qlora_recipes.commands.entry import run_command


@dataclass
class Ranks:
    """Processes that run, or have ended."""

    folder: Path
    pids: list[int]
    store: TCPStore
    codes: dict[int, int] = field(default_factory=dict)
    """Rank to exit code, negative for a signal."""

    def said(self, rank: int) -> str:
        """Return what a rank has printed so far."""
        return (self.folder / f"rank-{rank}.txt").read_text()

    @property
    def errors(self) -> list[str]:
        """The errors that were printed, by whichever rank."""
        said = [self.said(rank) for rank in range(len(self.pids))]
        assert not any("Traceback" in text for text in said), "\n".join(said)
        return [text[text.index("error: ") :] for text in said if "error: " in text]

    def wait(self, seconds: float = 60, ranks: Sequence[int] | None = None) -> dict[int, int]:
        """Wait until ranks have ended, all by default, and return the exit code of each that has."""
        until = time.monotonic() + seconds
        while any(rank not in self.codes for rank in (range(len(self.pids)) if ranks is None else ranks)):
            if time.monotonic() > until:
                self.end()
                raise AssertionError("\n".join(map(self.said, range(len(self.pids)))))
            self._reap(os.WNOHANG)
            time.sleep(0.02)
        return self.codes

    def end(self) -> None:
        """Kill what still runs."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
        self._reap(0)

    def _reap(self, how: int) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ended := os.waitpid(pid, how))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(ended[1])


def launcher_store() -> TCPStore:
    """Return what a launcher has for its processes to meet through; to be held as long as they run."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def launch_variables(rank: int, count: int, store: TCPStore, on_a_node: int) -> dict[str, str]:
    """Return the environment that a launcher gives to one of its processes."""
    given = {
        **{"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % on_a_node, "LOCAL_WORLD_SIZE": on_a_node},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True},
        "OMP_NUM_THREADS": 1,
    }
    return {name: str(value) for name, value in given.items()}


def start_ranks(
    count: int,
    target: Callable[[int], object],
    folder: Path,
    *,
    nodes: int = 1,
    variables: Callable[[int], Mapping[str, str]] = lambda rank: {},
) -> Ranks:
    """Fork `count` processes on as many `nodes`, each of which calls `target` with its rank as a command would."""
    store = launcher_store()
    folder.mkdir(parents=True, exist_ok=True)
    on_a_node, pids = count // nodes, []
    sys.stdout.flush()
    for rank in range(count):
        if child := os.fork():
            pids.append(child)
            continue
        os.environ.update(launch_variables(rank, count, store, on_a_node) | dict(variables(rank)))
        _call(target, rank, folder / f"rank-{rank}.txt")
    return Ranks(folder, pids, store)


def _call(target: Callable[[int], object], rank: int, file: Path) -> None:
    """Call the function and end the process, whatever happens."""
    code = 1
    try:
        out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  # pytest has put its own
        torch.set_num_threads(1)  # makes the pool anew that the fork broke, before threads race for it
        AcceleratorState._reset_state(reset_partial_state=True)  # earlier tests ran in one process
        PartialState._reset_state()
        run_command(lambda _: target(rank), [])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
