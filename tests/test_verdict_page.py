"""docs/verdict.md recomputes a verdict from the files alone, and gets what the library gets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_runs import answers, flipped, make_run

from qlora_recipes.comparison.folders import compare_folders

PAGE = (Path(__file__).parent.parent / "docs" / "verdict.md").read_text(encoding="utf-8")
PROGRAM, RARE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SCORES = answers(900)


def runs_of(root: Path, lost: int, won: int) -> list[Path]:
    return [make_run(root, "nf4", scores=flipped(SCORES, lost, won)), make_run(root, "bf16", scores=SCORES)]


def printed(root: Path, program: str, runs: list[Path], *tasks: str) -> list[float]:
    """Run a program of the page on two runs, and return every number that it prints."""
    (root / "recompute.py").write_text(program, encoding="utf-8")
    folders = [str(run / "evaluation") for run in runs]
    command = [sys.executable, str(root / "recompute.py"), *folders, *tasks]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", said)]


def test_the_program_on_the_page_gives_the_reports_intervals(tmp_path: Path) -> None:
    assert len([line for line in PROGRAM.splitlines() if line.strip()]) <= 36
    runs = runs_of(tmp_path, 110, 60)
    found = printed(tmp_path, PROGRAM, runs, "standin_choice", "standin_text")
    report = compare_folders(runs, 1.0)
    (contrast,), (task,), (bits,) = report.contrasts, report.contrasts[0].tasks, report.contrasts[0].bits
    overall = contrast.overall
    assert (task.score, task.baseline_score) == tuple(arm.overall.mean for arm in report.arms[::-1])
    assert found[:3] == pytest.approx([task.score, task.baseline_score, task.comparison.difference], abs=0.006)
    assert found[3:5] == pytest.approx([bits.a, bits.b], abs=0.00006)
    expected = np.r_[overall.difference, overall.interval, overall.difference, overall.interval_95]
    assert found[5:] == pytest.approx(expected.tolist(), abs=0.006)


@pytest.mark.parametrize(("lost", "won"), [(40, 20), (5, 1), (4, 0)])
def test_with_its_other_lines_it_does_so_where_few_documents_differ(tmp_path: Path, lost: int, won: int) -> None:
    runs = runs_of(tmp_path, lost, won)
    found = printed(tmp_path, PROGRAM + RARE, runs, "standin_choice")[3:]
    t, t_95, rare, rare_95, exact = found[1:3], found[4:6], found[6:8], found[8:10], found[10:]
    overall = compare_folders(runs, 1.0, tasks=["standin_choice"]).contrasts[0].overall
    assert overall.interval == pytest.approx((min(t[0], rare[0]), max(t[1], rare[1])), abs=0.006)
    bounds = [*t_95, *rare_95, *exact]
    assert overall.interval_95 == pytest.approx((min(bounds), max(bounds)), abs=0.006)
