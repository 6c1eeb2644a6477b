"""`eval/on_gpu.py`: run every part within the time there is, go on after one fails, and tell what came out.

Measures nothing itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_recipes import environment
from qlora_recipes.commands.flags import Parser, count, file_to_write
from qlora_recipes.errors import UsageError
from qlora_recipes.fields import Field
from qlora_recipes.run.files import write_text

_FLAGS = (
    count("minutes", "no part begins or goes on after this (9)", 9),
    Field("parts", "list[str]", "only the groups named (all)", "GROUP", None),
    file_to_write("json", "write the figures here", ".json"),
    file_to_write("markdown", "write the page here", ".md"),
)
_ROWS = 64
_MEDIAN, _SPREAD = 330, 0.75
"""Tokens of a row: with a log-normal spread, cut at the longest, a batch of 8 is half padding, as Guanaco's are."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for what a user can fix.
    """
    about = "Everything that only a GPU can show, in under ten minutes and without a network."
    asked = SimpleNamespace(**Parser("eval/on_gpu.py", about, {"flags": _FLAGS}).parse(argv))
    end = time.monotonic() + 60 * asked.minutes
    import torch  # after --help

    from qlora_recipes.base.device import check_gpu
    from qlora_recipes.experiments.gpu import page
    from qlora_recipes.experiments.gpu.parts import FULL, SMALL, parts
    from qlora_recipes.experiments.gpu.running import Outcome, Runner

    check_gpu()
    console, on_gpu = Console(highlight=False), torch.cuda.is_available()
    scale, here = FULL if on_gpu else SMALL, machine()
    dtype = "bfloat16" if here.get("bfloat16", True) else "float16"
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as folder, contextlib.ExitStack() as ending:
        scratch = Path(folder)
        todo = list(parts(scale, scratch, write_rows(scale.max_length, scratch), dtype))
        groups = list(dict.fromkeys(part.group for part in todo))
        if unknown := set(asked.parts or ()) - set(groups):
            raise UsageError(f"--parts: got {unknown.pop()!r}, expected some of {', '.join(groups)}")
        chosen = [part for part in todo if not asked.parts or part.group in asked.parts]
        needed = {part.needs for part in chosen}
        chosen = [part for part in todo if part in chosen or part.name in needed]
        outcomes = {part.name: Outcome(part.name, part.group) for part in chosen}
        runner = Runner(end, scratch)
        ending.callback(runner.stop)
        for part in chosen:
            outcomes[part.name] = found = runner.run(part, outcomes)
            console.print(Text(f"{found.state:11} {found.seconds:4.0f} s  {part.name}"))
            if found.state == "failed":
                console.print(Text("\n".join(f"    {line}" for line in found.said.splitlines()[-6:])))
            figures = {
                "machine": here,
                "versions": environment.versions(),
                "scale": asdict(scale),
                "outcomes": [asdict(each) for each in outcomes.values()],
            }
            if asked.json:  # after each part: what was measured stays, whatever comes next
                write_text(Path(asked.json), json.dumps(figures, indent=1) + "\n")
            if asked.markdown:
                write_text(Path(asked.markdown), page.write(figures))
    console.print(Text(page.write(figures)), soft_wrap=True)
    missed = [name for name, each in outcomes.items() if each.state != "done"]
    console.print(Text(f"not done: {', '.join(missed)}" if missed else "everything was done"))
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
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "cuda": torch.version.cuda,
    }


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
