"""Run folders that contradict themselves: each edit that leaves a trace is refused with one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import adapter_file, adapter_weights, answers, flipped, make_run

from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.errors import RecipesError
from qlora_recipes.evaluation.records import sha256

SCORES = answers(400)
Runs = dict[str, Path]


def edit(file: Path, **changes: Any) -> None:
    """Replace dotted keys of a JSON file, with `__` for the dot."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        section = content
        for part in path:
            section = section[part]
        section[last] = value
    file.write_text(json.dumps(content))


def edit_documents(run: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]], task: str, kept: int) -> None:
    """Edit the documents of a task and make their file's hash anew."""
    file = run / "evaluation" / f"{task}.docs.jsonl"
    lines = file.read_text().splitlines()[:kept]
    text = "".join(json.dumps(change(i, json.loads(line))) + "\n" for i, line in enumerate(lines))
    file.write_text(text)
    edit(run / "evaluation" / f"{task}.json", docs_sha256=sha256(text))


def weights_file(run: Path) -> Path:
    return run / "adapter" / "adapter_model.safetensors"


def relabeled(runs: Runs, precision: str, **changes: Any) -> Sequence[Path]:
    """The nf4 run, and a copy of it that says that it is another precision."""
    copy = runs["nf4"].parent / "copy"
    shutil.copytree(runs["nf4"], copy)
    edit(copy / "run.json", precision=precision, **changes)
    return [runs["nf4"], copy]


def copied_as_another_seed(runs: Runs) -> Sequence[Path]:
    copies = []
    for name, run in runs.items():
        copies.append(run.parent / f"{name}-seed1")
        shutil.copytree(run, copies[-1])
        edit(copies[-1] / "run.json", seed=1)
    return [*runs.values(), *copies]


def swapped(runs: Runs) -> None:
    one, other = (weights_file(run) for run in runs.values())
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def zeroed(runs: Runs) -> None:
    weights_file(runs["nf4"]).write_bytes(adapter_file(np.zeros_like(adapter_weights("nf4", 0))))


def all_right(runs: Runs) -> None:
    edit_documents(runs["nf4"], lambda i, row: {**row, "score": 1.0}, "standin_choice", 400)


def shorter_texts(runs: Runs) -> None:
    edit_documents(runs["nf4"], lambda i, row: {**row, "bits": 0.9 * row["bits"]}, "standin_text", 30)


def half_a_point(runs: Runs) -> None:
    edit_documents(runs["nf4"], lambda i, row: {**row, "score": row["score"] / 2}, "standin_choice", 400)


def only_the_first(runs: Runs) -> None:
    for run in runs.values():
        edit_documents(run, lambda i, row: row, "standin_choice", 300)


FORGERIES: dict[str, tuple[Callable[[Runs], Sequence[Path] | None], str]] = {
    "relabeled": (
        lambda runs: relabeled(runs, "bf16"),
        "copy is bf16 by its receipt, and its linear layers are 28 Linear4bit with 28 of 28 quantized",
    ),
    "relabeled, with other layers": (
        lambda runs: relabeled(runs, "bf16", base__linears={"Linear": 28}, base__quantized={"expected": 0, "found": 0}),
        r"nf4-seed0 \(nf4, seed 0\) and .*copy \(bf16, seed 0\) have the same base, to the bit",
    ),
    "relabeled within 4 bits": (lambda runs: relabeled(runs, "fp4"), "have the same base, to the bit"),
    "another base's hash, the same adapter": (
        lambda runs: relabeled(runs, "fp4", base__sha256="another"),
        "was scored with the base base-nf4, expected another",
    ),
    "one seed twice": (copied_as_another_seed, r"\(nf4, seed 0\) .* \(nf4, seed 1\) have the same adapter, to the bit"),
    "not all layers": (
        lambda runs: edit(runs["nf4"] / "run.json", base__quantized={"expected": 28, "found": 27}),
        "28 Linear4bit with 27 of 28 quantized; expected 28 Linear4bit, all of them quantized",
    ),
    "8-bit layers": (
        lambda runs: edit(runs["nf4"] / "run.json", base__linears={"Linear8bitLt": 28}),
        "its linear layers are 28 Linear8bitLt",
    ),
    "swapped": (swapped, "adapter_model.safetensors has weights with the hash .* it was swapped or overwritten"),
    "zeroed": (zeroed, "nf4-seed0 ended with: it was swapped or overwritten after training"),
    "no safetensors": (
        lambda runs: weights_file(runs["nf4"]).write_bytes(b"weights") and None,
        r"adapter_model\.safetensors cannot be read",
    ),
    "scores": (all_right, r"standin_choice has acc 0\.\d+, and its documents have 1: one of the two was edited"),
    "bits": (shorter_texts, r"standin_text has bits_per_byte 1\.02, and its documents have 0\.918"),
    "a figure": (
        lambda runs: edit(runs["bf16"] / "evaluation" / "standin_choice.json", metrics={"acc": 0.9}),
        "bf16-seed0: standin_choice has acc 0.9, and its documents have 0.7375",
    ),
    "half points": (half_a_point, "of standin_choice has the score 0.5, expected 0 for wrong or 1 for right"),
    "fewer documents": (only_the_first, "standin_choice is the result of 400 documents, and 300 are there"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_folder_that_contradicts_itself_is_refused(tmp_path: Path, forgery: str) -> None:
    runs = {
        "nf4": make_run(tmp_path, "nf4", scores=flipped(SCORES, 3, 2)),
        "bf16": make_run(tmp_path, "bf16", scores=SCORES),
    }
    compare_folders(list(runs.values()), 1.0)
    forge, said = FORGERIES[forgery]
    compared = forge(runs) or list(runs.values())
    with pytest.raises(RecipesError, match=said) as refusal:
        compare_folders(compared, 1.0)
    assert "Evaluate" in str(refusal.value) or "rain" in str(refusal.value)


def test_one_precision_on_two_bases_is_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, seed, SCORES) for name in ("nf4", "bf16") for seed in (0, 1)]
    compare_folders(runs, 1.0)
    edit(runs[1] / "run.json", base__sha256="another")
    for result in (runs[1] / "evaluation").glob("*[!s].json"):
        edit(result, base_sha256="another")
    with pytest.raises(RecipesError, match="are both nf4, on bases with the hashes base-nf4 and another"):
        compare_folders(runs, 1.0)


def test_every_precision_has_its_own_layers(tmp_path: Path) -> None:
    precisions = ("bf16", "int8", "nf4", "nf4-single", "fp4")
    report = compare_folders([make_run(tmp_path, name, scores=SCORES) for name in precisions], 1.0)
    assert [arm.precision for arm in report.arms] == list(precisions)
