"""docs/verdict.md recomputes a verdict from the files alone, and gets what the library gets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_runs import answers, flipped, make_run

from qlora_recipes.commands.compare import compare_folders

PAGE = (Path(__file__).parent.parent / "docs" / "verdict.md").read_text(encoding="utf-8")


def test_the_program_on_the_page_gives_the_reports_intervals(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) <= 36
    scores = answers(900)
    runs = [make_run(tmp_path, "nf4", scores=flipped(scores, 110, 60)), make_run(tmp_path, "bf16", scores=scores)]
    (tmp_path / "recompute.py").write_text(program, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "recompute.py"), *map(str, runs), "standin_choice"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", printed.replace("%", ""))]
    overall = compare_folders(runs, 1.0, tasks=["standin_choice"]).contrasts[0].overall
    expected = np.r_[overall.difference, overall.interval, overall.difference, overall.interval_95]
    assert found == pytest.approx(expected.tolist(), abs=0.006)
