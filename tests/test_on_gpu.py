"""`eval/on_gpu.py` goes on after a part that fails, and its page says what ran and what did not."""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import kill_and_resume
import pytest
import torch

from qlora_recipes import environment
from qlora_recipes.experiments.gpu import measure, page
from qlora_recipes.experiments.gpu.command import Outcome, main, run_part, write_rows
from qlora_recipes.experiments.gpu.parts import SMALL, Part, parts


def outcome(code: str, tmp_path: Path, *, seconds: int = 60, left: float = 60, **others: object) -> Outcome:
    part = Part("a part", "runs", (sys.executable, "-c", code), seconds, **others)  # type: ignore[arg-type]
    before = {"base": Outcome("base", "base", "failed")}
    return run_part(part, before, time.monotonic() + left, tmp_path)


def test_a_part_that_fails_says_why(tmp_path: Path) -> None:
    found = outcome("import sys; print('no kernel image'); sys.exit(3)", tmp_path)
    assert found.state == "failed" and found.said.split() == "no kernel image ended with 3".split()


def test_a_part_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    found = outcome(child, tmp_path, seconds=1)
    assert found.state == "failed" and found.said == "ended after 1 s, the limit" and found.seconds < 30


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(left=5), "no time was left"),
        (dict(needs="base"), "base was not done"),
        (dict(needs_gpu=True), "it needs a GPU"),
    ],
)
def test_a_part_that_cannot_run_is_not_reached(given: dict[str, object], why: str, tmp_path: Path) -> None:
    found = outcome("raise SystemExit(1)", tmp_path, **given)  # type: ignore[arg-type]
    assert found.state == "not reached" and found.said == why


def test_every_measurement_has_its_base(tmp_path: Path) -> None:
    found = list(parts(SMALL, tmp_path, tmp_path / "rows.jsonl"))
    names = [part.name for part in found]
    assert len(names) == len(set(names))
    assert all(part.needs in names[: names.index(part.name)] for part in found if part.needs)


def test_what_is_measured_is_written(tmp_path: Path) -> None:
    rows = write_rows(SMALL.max_length, tmp_path)
    spec = next(part.specification for part in parts(SMALL, tmp_path, rows) if part.specification)
    made = measure.base(spec)
    figures, scored = measure.attention(spec), measure.evaluation(spec)
    assert made["bytes"] > 0 and figures["heads"] == [2, 2] and figures["largest_difference"] < 0.05
    assert scored["rows"] == 64 and scored["tokens_per_second"] > 0 and 0 < scored["planned_bytes"] < 2**30
    found = [
        Outcome("attention llama2", "attention", "done", 1.0, "", figures),
        Outcome("evaluation llama2", "evaluation", "done", 1.0, "", scored),
        Outcome("tests", "tests", "failed", said="no kernel image\nended with 1"),
    ]
    scale, machine = asdict(SMALL), {"device": "cpu", "name": "2 processors, no GPU"}
    text = page.write(
        dict(machine=machine, versions=environment.versions(), scale=scale, outcomes=list(map(asdict, found)))
    )
    assert page.NO_GPU in text and "2 heads, 2 of keys" in text and "64 rows, 4,096 positions at a time" in text
    assert "| tests | failed | 0 | no kernel image; ended with 1 |" in text


@pytest.mark.slow
def test_the_whole_program_goes_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    main(["--markdown", str(tmp_path / "gpu.md"), "--json", str(tmp_path / "gpu.json")])
    outcomes = json.loads((tmp_path / "gpu.json").read_text())["outcomes"]
    assert {each["state"] for each in outcomes if "it needs a GPU" not in each["said"]} == {"done"}


def test_runs_to_kill_are_no_forks_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing bitsandbytes opens it (cuda_specs.py of 0.50), and CUDA refuses a fork of that process."""
    assert importlib.reload(kill_and_resume).START == "fork"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert importlib.reload(kill_and_resume).START == "spawn"
