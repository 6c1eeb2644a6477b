"""Runs parts one after the other, each within its time; whatever fails or hangs ends with all it has started.

Knows nothing of what a part measures.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_recipes.experiments.gpu.parts import Part

_MEASURE = (sys.executable, "-m", "qlora_recipes.experiments.gpu.measure")
_LEAST = 10
"""Seconds without which no part begins."""


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    group: str
    state: str = "not reached"
    """`done`, `failed` or `not reached`."""
    seconds: float = 0.0
    said: str = "no time was left"
    """The last lines that it printed; why it failed, or was not reached."""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Runner:
    """Runs parts until a moment of `time.monotonic()`; measurements of one session share a process until one fails."""

    end: float
    scratch: Path
    _session: str = ""
    _process: subprocess.Popen[bytes] | None = None

    def run(self, part: Part, before: dict[str, Outcome]) -> Outcome:
        """Run a part, if it can be."""
        outcome = Outcome(part.name, part.group)
        if part.needs_gpu and not torch.cuda.is_available():
            outcome.said = "it needs a GPU"
        elif part.needs and before[part.needs].state != "done":
            outcome.said = f"{part.needs} was not done"
        elif self.end - time.monotonic() >= _LEAST:
            self._run(part, outcome)
        return outcome

    def _run(self, part: Part, outcome: Outcome) -> None:
        start, result = time.monotonic(), self.scratch / "result.json"
        deadline = min(start + part.seconds, self.end)
        result.unlink(missing_ok=True)
        if not part.session or part.session != self._session or not self._running:
            self._start(part)
        process, heard = self._process, self._log.stat().st_size
        assert process is not None and process.stdin is not None
        if part.specification:
            asked = {"what": part.what, "specification": asdict(part.specification), "result": str(result)}
            with contextlib.suppress(BrokenPipeError):  # it has ended, which is seen next
                process.stdin.write(f"{json.dumps(asked)}\n".encode())
        while self._running and not result.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        if result.exists():
            outcome.state, ended = "done", ""
            outcome.figures = json.loads(result.read_text(encoding="utf-8"))
        elif self._running:
            ended = f"ended after {deadline - start:.0f} s, the limit"
            if deadline == self.end:
                ended = f"no time was left after {deadline - start:.0f} s"
            else:
                outcome.state = "failed"
        else:
            whole = process.returncode == 0 and not part.specification
            outcome.state, ended = ("done", "") if whole else ("failed", f"ended with {process.returncode}")
        if outcome.state != "done":
            self.stop()
        said = self._log.read_bytes()[heard:].decode("utf-8", "replace")
        outcome.said, outcome.seconds = f"{said}\n{ended}".strip()[-3000:], time.monotonic() - start

    @property
    def _log(self) -> Path:
        return self.scratch / "log.txt"

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self, part: Part) -> None:
        """Start the process of a part or of its session, on one GPU and without a network."""
        self.stop()
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        own = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": gpu, "QLORA_RECIPES_TEST_GPU": gpu}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                part.command or _MEASURE,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                bufsize=0,
                start_new_session=True,  # a group of its own, which ends as one
            )
        self._session = part.session

    def stop(self) -> None:
        """End the process that runs, if one does, and whatever it has started."""
        if self._process is None:
            return
        if self._process.stdin:
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):  # it has ended, and all that it had started
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
