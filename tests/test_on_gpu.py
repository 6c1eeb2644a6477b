"""`eval/on_gpu.py` goes on after a part that fails, and its page says what ran and what did not."""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill_and_resume
import pytest
import torch
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM

from qlora_recipes import environment
from qlora_recipes.experiments.gpu import measure, page, running
from qlora_recipes.experiments.gpu.bases import drawn_weights
from qlora_recipes.experiments.gpu.command import main, write_rows
from qlora_recipes.experiments.gpu.parts import FULL, ROOT, SMALL, Part, parts
from qlora_recipes.experiments.gpu.running import Outcome, Runner
from qlora_recipes.experiments.throughput.arms import Specification


def outcome(code: str, tmp_path: Path, *, seconds: int = 60, left: float = 60, **others: object) -> Outcome:
    part = Part("a part", "runs", seconds, (sys.executable, "-c", code), **others)  # type: ignore[arg-type]
    before = {"base": Outcome("base", "base", "failed")}
    runner = Runner(time.monotonic() + left, tmp_path)
    try:
        return runner.run(part, before)
    finally:
        runner.stop()


def test_a_part_that_fails_says_why(tmp_path: Path) -> None:
    found = outcome("import sys; print('no kernel image'); sys.exit(3)", tmp_path)
    assert found.state == "failed" and found.said.split() == "no kernel image ended with 3".split()


def test_a_part_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    found = outcome(child, tmp_path, seconds=1)
    assert found.state == "failed" and found.said == "ended after 1 s, the limit" and found.seconds < 30


def test_a_part_that_the_end_comes_over_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_LEAST", 0)
    found = outcome("import time; time.sleep(60)", tmp_path, left=1)
    assert (found.state, found.said) == ("not reached", "no time was left after 1 s")


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


SESSION = """
import json, os, pathlib, sys
for line in sys.stdin:
    asked = json.loads(line)
    print("asked for", asked["what"])
    if asked["what"] == "bad":
        sys.exit("no kernel image")
    pathlib.Path(asked["result"]).write_text(json.dumps({"process": os.getpid()}))
"""
"""Stands in for `measure.py`."""


def test_measurements_share_a_process_until_one_fails(tmp_path: Path) -> None:
    spec = Specification("llama2", "base", "rows", "nf4", "bfloat16", 64, 2, 8, "auto")
    given: dict[str, Any] = dict(command=(sys.executable, "-uc", SESSION), specification=spec)
    runner = Runner(time.monotonic() + 60, tmp_path)
    try:
        done = [
            runner.run(Part(str(i), "speed", 30, what=what, session=session, **given), {})
            for i, (what, session) in enumerate([("a", "x"), ("b", "x"), ("bad", "x"), ("c", "x"), ("d", "y")])
        ]
    finally:
        runner.stop()
    assert [each.state for each in done] == ["done", "done", "failed", "done", "done"]
    assert done[1].said == "asked for b" and done[2].said.split("\n")[1:] == ["no kernel image", "", "ended with 1"]
    first, second, third, other = (each.figures["process"] for each in done if each.figures)
    assert first == second and len({second, third, other}) == 3


def test_what_ran_is_written_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, ...]] = []

    def run(self: Runner, part: Part, before: object) -> Outcome:
        if (tmp_path / "gpu.md").exists():
            written.append(
                tuple(re.findall("[|] (base|attention) llama2 [|] (?:done)", (tmp_path / "gpu.md").read_text()))
            )
        return Outcome(part.name, part.group, "failed" if part.group == "attention" else "done")

    monkeypatch.setattr(Runner, "run", run)
    with pytest.raises(SystemExit, match="1"):
        main(["--markdown", str(tmp_path / "gpu.md"), "--parts", "attention"])
    assert written[0] == ("base",)
    assert "| attention falcon | failed |" in (tmp_path / "gpu.md").read_text()


def test_a_part_sees_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several, scripts of TRL would divide the model or refuse."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['QLORA_RECIPES_TEST_GPU'])"
    assert outcome(code, tmp_path).said == "2 2"


def test_a_base_of_a_7b_model_takes_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SMALL", FULL)
    specs = [part.specification for part in parts(FULL, tmp_path, tmp_path) if part.what == "base"]
    for spec, whole in zip(specs, (6_738_415_616, 6_921_720_704), strict=True):
        assert spec is not None and measure.base(spec) == {"bytes": 2 * whole}
        assert (Path(spec.model) / "model.safetensors").stat().st_blocks * 512 < 2**20


def test_make_gpu_works_on_a_fresh_clone() -> None:
    """Git keeps no empty folder, and a flag's file has to be in one that exists."""
    recipe = re.search(r"^gpu:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    made, files = re.findall(r"mkdir -p (\S+)", recipe[1]), re.findall(r"--(?:json|markdown) (\S+)", recipe[1])
    assert {str(Path(file).parent) for file in files} == {"runs", "docs"} and made == ["runs"]


def test_every_measurement_has_its_base(tmp_path: Path) -> None:
    found = list(parts(SMALL, tmp_path, tmp_path / "rows.jsonl"))
    names = [part.name for part in found]
    assert len(names) == len(set(names))
    assert all(part.needs in names[: names.index(part.name)] for part in found if part.needs)


def test_what_is_measured_is_written(tmp_path: Path) -> None:
    rows = write_rows(SMALL.max_length, tmp_path)
    spec = next(part.specification for part in parts(SMALL, tmp_path, rows) if part.specification)
    made = measure.base(spec)
    with drawn_weights():
        figures, scored = measure.attention(spec), measure.evaluation(spec)
        load = functools.partial(AutoModelForCausalLM.from_pretrained, spec.model, dtype=torch.bfloat16)
        (model, loading), again = load(output_loading_info=True), load()
    assert not any(loading.values()) and {0.02} == {
        round(float(weight.data.float().std()), 3) for weight in model.parameters() if weight.ndim == 2
    }
    assert all(map(torch.equal, model.parameters(), again.parameters()))
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


def test_a_profile_counts_no_kernel_twice() -> None:
    """PyTorch lists a kernel's time with the operator that launched it, and with the kernel."""
    on_cpu, on_gpu = DeviceType.CPU, DeviceType.CUDA
    events = [
        SimpleNamespace(key=key, device_type=device, self_device_time_total=1000 * ms, count=count)
        for key, device, ms, count in [
            ("sm90_gemm", on_gpu, 3, 7),
            ("aten::add", on_cpu, 1, 9),
            ("aten::mm", on_cpu, 3, 7),
            ("cudaStreamSynchronize", on_cpu, 0, 2),
            ("cudaDeviceSynchronize", on_cpu, 0, 1),
        ]
    ]
    found = measure.by_operator(events, on_gpu=True)
    assert list(found["milliseconds"].items())[:2] == [("aten::mm", 3.0), ("aten::add", 1.0)]
    assert (found["total_milliseconds"], found["waits"]) == (4.0, 2)


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
