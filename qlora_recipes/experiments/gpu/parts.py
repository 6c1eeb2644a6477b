"""What is run on a GPU, in order of what it is worth, each part a process of its own. Runs nothing itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_recipes.experiments.throughput.arms import ARMS, SCRIPTS, Specification

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
SMALL = Scale({"llama2": 256, "falcon": 256}, 2, {"llama2": 4096, "falcon": 4096}, 256, 2)
"""What a CPU takes through the same programs."""


@dataclass(frozen=True)
class Part:
    """One thing to run."""

    name: str
    group: str
    """The table of the page that its figures go to."""
    command: tuple[str, ...]
    seconds: int
    """Longer than this it is ended."""
    needs: str = ""
    """A part without which this one has nothing to run on."""
    needs_gpu: bool = False
    specification: Specification | None = None
    """Of a measurement, which reads it from a file and writes its figures into another."""


def parts(scale: Scale, scratch: Path, rows: Path) -> Iterator[Part]:
    """Yield every part."""
    python = sys.executable
    yield Part("tests", "tests", (python, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")), 150, needs_gpu=True)
    for name in ("llama2_guanaco", "falcon_guanaco"):
        recipe, folder = str(ROOT / "recipes" / f"{name}.py"), str(scratch / name)
        train = (python, recipe, "--demo", "--max_steps", "20", "--output_dir", folder)
        yield Part(f"demo {name}", "runs", train, 90)
    evaluate = (python, "-m", "qlora_recipes.cli", "evaluate", str(scratch / "llama2_guanaco"), "--limit", "64")
    yield Part("evaluate llama2_guanaco", "runs", evaluate, 90, needs="demo llama2_guanaco")
    resume = (python, str(ROOT / "tests" / "kill_and_resume.py"), "--kills", "2")
    yield Part("kill and resume", "runs", resume, 120)
    shared = ("nf4", "bfloat16", scale.max_length, scale.steps, 16, "auto")
    specs = [Specification(family, str(scratch / f"base-{family}"), str(rows), *shared) for family in FULL.hidden_size]
    for spec in specs:
        yield _measured("base", spec, seconds=90)
        for precision, dtype in (("nf4", "bfloat16"), ("bf16", "bfloat16"), ("fp16", "float16")):
            yield _measured("recipe", replace(spec, precision=precision, dtype=dtype), seconds=75)
        yield _measured("attention", spec, seconds=45)
        yield _measured("evaluation", spec, seconds=60)
    for spec in specs:
        yield _measured("profile", spec, seconds=60)
        for arm in SCRIPTS:
            yield _measured(arm, spec, seconds=90)


def _measured(what: str, spec: Specification, *, seconds: int) -> Part:
    arm, family = what in ARMS, spec.family
    name = f"{what} {family} {spec.precision}" if arm else f"{what} {family}"
    command = (sys.executable, "-m", "qlora_recipes.experiments.gpu.measure", what)
    needs = "" if what == "base" else f"base {family}"
    return Part(name, "speed" if arm else what, command, seconds, needs, spec.dtype == "float16", spec)
