"""Several processes of one run without a launcher: forks of the test, which has imported everything already."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def in_processes(number: int, act: Callable[[int], object], log: Path, timeout: float = 120) -> None:
    """Call `act` with its rank in that many processes, joined by gloo; raise with what they said when one fails."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = [_fork(rank, number, port, act, log) for rank in range(number)]
    running, codes, end = set(children), [], time.monotonic() + timeout
    try:
        while running and time.monotonic() < end and not any(codes):
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.remove(pid)
                    codes.append(os.waitstatus_to_exitcode(status))
            time.sleep(0.05)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert codes == [0] * number, log.read_text()


def _fork(rank: int, number: int, port: int, act: Callable[[int], object], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate warns that it sets it
        torch.set_num_threads(1)  # makes the pool anew that the fork broke, before threads race for it
        _forget_accelerate()
        act(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _forget_accelerate() -> None:
    """Accelerate keeps the parent's number of processes in its classes."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
