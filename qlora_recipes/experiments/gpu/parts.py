"""What is run on a GPU, in order of what it is worth. Runs nothing itself.

Imports take a process longer than most measurements take, so these share processes; one that fails ends its own alone.
TRL's scripts are in processes without this package's repairs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_recipes.experiments.throughput.arms import ARMS, Specification

ROOT = Path(__file__).resolve().parents[3]
"""The checkout: the tests and the recipes are beside the package."""


@dataclass(frozen=True)
class Scale:
    """How large the models of the measurements are."""

    hidden_size: dict[str, int]
    num_hidden_layers: int
    vocab_size: dict[str, int | None]
    """None is that of the 7B model."""
    max_length: int
    steps: int


FULL = Scale({"llama2": 4096, "falcon": 4544}, 32, {"llama2": None, "falcon": None}, 1024, 4)
"""The 7B models' own shapes."""
SMALL = Scale({"llama2": 256, "falcon": 256}, 2, {"llama2": 4096, "falcon": 4096}, 256, 3)
"""What a CPU takes through the same programs."""


@dataclass(frozen=True)
class Part:
    """One thing to run."""

    name: str
    group: str
    """The table of the page that its figures go to."""
    seconds: int
    """Longer than this it is ended: about three times what an H200 should take."""
    command: tuple[str, ...] = ()
    """Empty for a measurement, which has a specification."""
    needs: str = ""
    """A part without which this one has nothing to run on."""
    needs_gpu: bool = False
    what: str = ""
    """What is measured."""
    specification: Specification | None = None
    session: str = ""
    """Parts of one session that follow each other share a process."""


def parts(scale: Scale, scratch: Path, rows: Path, dtype: str = "bfloat16") -> Iterator[Part]:
    """Yield every part; `dtype` is the 16-bit dtype that the machine computes in."""
    python = sys.executable
    files = [str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_optimizers.py")]
    # Not as strict as elsewhere: a library's warning, or another pytest, is no failure of a GPU.
    lenient = ("-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider")
    yield Part("tests", "tests", 150, (python, "-m", "pytest", "-q", "-m", "gpu", *lenient, *files), needs_gpu=True)
    yield _demo("llama2_guanaco", scratch)

    shared = ("nf4", dtype, scale.max_length, scale.steps, 16, "auto")
    llama, falcon = (
        Specification(family, str(scratch / f"base-{family}"), str(rows), *shared) for family in ("llama2", "falcon")
    )
    for spec in (llama, falcon):
        yield _measured("base", spec, "recipe", 60)
        yield _measured("recipe", spec, "recipe", 60)
    yield _measured("profile", llama, "recipe", 45)
    for spec in (llama, falcon):
        yield _measured("trl_by_hand", spec, "scripts", 60)
        yield _measured("trl_notebook", spec, "scripts", 45)
    for spec in (llama, falcon):
        yield _measured("attention", spec, "others", 45)
        yield _measured("evaluation", spec, "others", 45)
        yield _measured("recipe", replace(spec, precision="bf16", dtype="bfloat16"), "others", 60)
        yield _measured("recipe", replace(spec, precision="fp16", dtype="float16"), "others", 60)
    yield _measured("profile", falcon, "others", 45)

    resume = (python, str(ROOT / "tests" / "kill_and_resume.py"), "--kills", "2", "--variants", "nf4, packed")
    yield Part("kill and resume", "runs", 120, resume)
    evaluate = (python, "-m", "qlora_recipes.cli", "evaluate", str(scratch / "llama2_guanaco"), "--limit", "64")
    yield Part("evaluate llama2_guanaco", "runs", 60, evaluate, needs="demo llama2_guanaco")
    yield _demo("falcon_guanaco", scratch)
    for spec in (llama, falcon):
        yield _measured("trl_defaults", replace(spec, steps=scale.steps - 1), "scripts", 90)


def _demo(name: str, scratch: Path) -> Part:
    recipe, folder = str(ROOT / "recipes" / f"{name}.py"), str(scratch / name)
    command = (sys.executable, recipe, "--demo", "--max_steps", "20", "--output_dir", folder)
    return Part(f"demo {name}", "runs", 75, command)


def _measured(what: str, spec: Specification, session: str, seconds: int) -> Part:
    arm, family = what in ARMS, spec.family
    return Part(
        f"{what} {family} {spec.precision}" if arm else f"{what} {family}",
        "speed" if arm else what,
        seconds,
        needs="" if what == "base" else f"base {family}",
        needs_gpu=spec.dtype == "float16",
        what=what,
        specification=spec,
        session=session,
    )
