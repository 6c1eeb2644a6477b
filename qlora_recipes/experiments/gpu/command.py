"""`eval/on_gpu.py`: run every part within the time there is, go on after one fails, and tell what came out.

Measures nothing itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from qlora_recipes import environment
from qlora_recipes.commands.flags import Parser, count, file_to_write
from qlora_recipes.errors import UsageError
from qlora_recipes.fields import Field

if TYPE_CHECKING:
    from qlora_recipes.experiments.gpu.parts import Part

_FLAGS = (
    count("minutes", "no part begins or goes on after this (9)", 9),
    Field("parts", "list[str]", "only the groups named (all)", "GROUP", None),
    file_to_write("json", "write the figures here", ".json"),
    file_to_write("markdown", "write the page here", ".md"),
)
_ROWS = 64
_MEDIAN, _SPREAD = 330, 0.75
"""Tokens of a row: with a log-normal spread, cut at the longest, a batch of 8 is half padding, as Guanaco's are."""


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    group: str
    state: str
    """`done`, `failed` or `not reached`."""
    seconds: float = 0.0
    said: str = ""
    """The last lines that it printed; why it failed, or was not reached."""
    figures: dict[str, Any] = field(default_factory=dict)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for what a user can fix.
    """
    about = "Everything that only a GPU can show, in under ten minutes and without a network."
    asked = SimpleNamespace(**Parser("eval/on_gpu.py", about, {"flags": _FLAGS}).parse(argv))
    end = time.monotonic() + 60 * asked.minutes
    import torch  # after --help

    from qlora_recipes.experiments.gpu import page
    from qlora_recipes.experiments.gpu.parts import FULL, SMALL, parts

    console, on_gpu = Console(highlight=False), torch.cuda.is_available()
    scale = FULL if on_gpu else SMALL
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as folder:
        scratch = Path(folder)
        todo = list(parts(scale, scratch, write_rows(scale.max_length, scratch)))
        groups = list(dict.fromkeys(part.group for part in todo))
        if unknown := set(asked.parts or ()) - set(groups):
            raise UsageError(f"--parts: got {unknown.pop()!r}, expected some of {', '.join(groups)}")
        outcomes: dict[str, Outcome] = {}
        chosen = [part for part in todo if not asked.parts or part.group in asked.parts]
        needed = {part.needs for part in chosen}
        for part in (part for part in todo if part in chosen or part.name in needed):
            outcomes[part.name] = found = run_part(part, outcomes, end, scratch)
            console.print(Text(f"{found.state:11} {found.seconds:4.0f} s  {part.name}"))
            if found.state == "failed":
                console.print(Text("\n".join(f"    {line}" for line in found.said.splitlines()[-6:])))
    figures = {
        "machine": machine(),
        "versions": environment.versions(),
        "scale": asdict(scale),
        "outcomes": [asdict(each) for each in outcomes.values()],
    }
    missed = [name for name, each in outcomes.items() if each.state != "done"]
    console.print(Text(f"not done: {', '.join(missed)}" if missed else "everything was done"))
    if asked.json:
        Path(asked.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if asked.markdown:
        Path(asked.markdown).write_text(page.write(figures), encoding="utf-8")
    if any(each.state == "failed" for each in outcomes.values()):
        sys.exit(1)


def machine() -> dict[str, Any]:
    """Return what this machine computes with."""
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu", "name": f"{os.cpu_count()} processors, no GPU"}
    found = torch.cuda.get_device_properties(0)
    return {
        "device": "cuda",
        "name": found.name,
        "bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def run_part(part: Part, before: dict[str, Outcome], end: float, scratch: Path) -> Outcome:
    """Run a part as far as time goes; its processes end with it."""
    import torch

    outcome = Outcome(part.name, part.group, "not reached")
    if part.needs_gpu and not torch.cuda.is_available():
        outcome.said = "it needs a GPU"
        return outcome
    if part.needs and before[part.needs].state != "done":
        outcome.said = f"{part.needs} was not done"
        return outcome
    if (left := end - time.monotonic()) < 10:
        outcome.said = "no time was left"
        return outcome
    command, result = list(part.command), scratch / "result.json"
    result.unlink(missing_ok=True)
    if part.specification:
        given = scratch / "specification.json"
        given.write_text(json.dumps(asdict(part.specification)), encoding="utf-8")
        command += [str(given), str(result)]
    start, limit = time.monotonic(), min(part.seconds, left)
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "QLORA_RECIPES_TEST_GPU": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=limit)
        ended = "" if process.returncode == 0 else f"\nended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: whatever it has started ends too
        said, _ = process.communicate()
        ended = f"\nended after {limit:.0f} s, the limit"
    except BaseException:  # Ctrl-C, which does not reach that group
        os.killpg(process.pid, signal.SIGKILL)
        raise
    outcome.seconds = time.monotonic() - start
    outcome.state, outcome.said = ("failed" if ended else "done"), (said + ended)[-3000:].strip()
    if not ended and part.specification:
        outcome.figures = json.loads(result.read_text(encoding="utf-8"))
    return outcome


def write_rows(longest: int, scratch: Path) -> Path:
    """Write conversations whose lengths spread as those of Guanaco do."""
    draw, file = random.Random(0), scratch / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(_ROWS):
            words = int(min(longest, _MEDIAN * longest / 1024 * draw.lognormvariate(0, _SPREAD)) / 3) + 4
            answer = " ".join(str(draw.randrange(10)) for _ in range(words))
            turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return file
