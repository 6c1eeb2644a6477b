"""SIGTERM and SIGINT: the running step is finished and saved, and then the process ends; a second signal ends it now.

Slurm's preemption, a spot machine's notice and Ctrl-C send them. Evaluations save no half tasks: they end at once, and
only finish what is being written. Knows nothing of trainers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A queue may signal every process of a job while the launcher passes its own signal on: both are the same request.
_ECHO_SECONDS = 0.5


class Stopped(SystemExit):
    """A signal ended the run; the exit code is 128 and the signal's number, as shells have it: 143 or 130."""

    def __init__(self, received: signal.Signals, step: int | None) -> None:
        super().__init__(128 + received)
        self.signal = received
        self.step = step
        """The step whose checkpoint was saved, or None where nothing was."""


class StopSignals:
    """While entered, remembers the first signal for the training loop to act on."""

    def __init__(self, finishing: str = "the running step is finished and saved") -> None:
        self.finishing = finishing
        self.received: signal.Signals | None = None
        self.loop_runs = False
        """Whether a training loop will see `received` soon; elsewhere nothing is unsaved: a signal stops at once."""
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            for which in _SIGNALS:
                self._before[which] = signal.signal(which, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish the block first; a signal that came in it, or that a library swallowed before, ends after it."""
        self.loop_runs = True
        try:
            yield
        finally:
            self.loop_runs = False
        if self.received is not None:
            raise Stopped(self.received, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == self.received and time.monotonic() - self._at < _ECHO_SECONDS:
                return
            os._exit(128 + number)  # the second signal: do not wait for a step, a save or a library
        self.received, self._at = signal.Signals(number), time.monotonic()
        if not self.loop_runs:
            raise Stopped(self.received, None)
        notice = f"\n{self.received.name}: stopping when {self.finishing}; again stops at once\n"
        os.write(2, notice.encode())  # print() may be what the signal interrupted
