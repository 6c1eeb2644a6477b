"""A damaged, edited or foreign file of a run folder is one error with its file and its key, on every command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import answers, make_run, receipt

from qlora_recipes import cli
from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.recipe_cli import settings_from
from qlora_recipes.errors import RunFolderError
from qlora_recipes.evaluation import harness, loaded
from qlora_recipes.evaluation.loaded import RestoredBase
from qlora_recipes.evaluation.records import Divergence, LayerError, sha256, write_divergence, write_quantization_error
from qlora_recipes.experiments.benchmark import command as benchmark
from qlora_recipes.experiments.benchmark.plan import plan_benchmark, preregister
from qlora_recipes.recipe import load_recipe
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.training.journal import restore_batch

RECIPE = Path(__file__).parent.parent / "recipes" / "llama2_guanaco.py"
PRECISIONS = ["nf4", "bf16"]
MISSING = object()
NAN = float("nan")
MESSAGES = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Kropa."}]
STARTED = {"started": "2026", "run": {"lora": {}, "training": {}}, "versions": {}, "resumes": []}

COMMANDS: dict[str, Callable[[Path], None]] = {
    "compare": lambda root: cli.main(["compare", *(str(root / f"{name}-seed0") for name in PRECISIONS)]),
    "evaluate": lambda root: cli.main(["evaluate", str(root / "bf16-seed0"), "--tasks", "held_out"]),
    "chat": lambda root: cli.main(["chat", str(root / "bf16-seed0")]),
    "merge": lambda root: cli.main(["merge", str(root / "bf16-seed0")]),
    "benchmark": lambda root: run_command(
        benchmark.main, [str(RECIPE), "--demo", "--precisions", *PRECISIONS, "--output", str(root)]
    ),
    "resume": lambda root: load_recipe(RECIPE).main(["--demo", "--resume", "--output_dir", str(root / "started")]),
}

RUN, SCORES = "bf16-seed0/run.json", "bf16-seed0/evaluation/standin_choice.json"
DOCS, METRICS = "bf16-seed0/evaluation/standin_choice.docs.jsonl", "bf16-seed0/metrics.jsonl"
HELD_OUT, STARTED_FILE = "bf16-seed0/held_out.json", "started/started.json"
DIVERGENCE = f"nf4-seed0/evaluation/divergence/from-{receipt('bf16', 0).adapter.final_sha256[:16]}.json"
ERRORS = "nf4-seed0/evaluation/divergence/quantization_error.json"
REPORT, BENCHMARK = "report/report.json", "benchmark.json"

READERS = {
    RUN: ["compare", "evaluate", "chat", "merge", "benchmark"],
    STARTED_FILE: ["resume"],
    HELD_OUT: ["evaluate", "chat", "merge"],
    METRICS: ["compare"],
    SCORES: ["compare", "evaluate"],
    DOCS: ["compare"],
    DIVERGENCE: ["compare"],
    ERRORS: ["compare"],
    REPORT: ["compare"],
    BENCHMARK: ["benchmark", "compare"],
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "garbage": lambda content: bytes(range(256)),
    "zeros": lambda content: bytes(len(content)),
    "null": lambda content: b"null\n",
    "a number": lambda content: b"7\n",
    "of another kind": lambda content: b"[7]\n" if content.startswith(b"{") else b"{}\n",
    "nested without end": lambda content: b"[" * 100_000,
}
EDITS: list[tuple[str, str, Any]] = [
    (RUN, "schema_version", 2),
    (RUN, "seed", "0"),
    (RUN, "seed", 0.5),
    (RUN, "demo", 1),
    (RUN, "precision", "nf5"),
    (RUN, "dtype", "float8"),
    (RUN, "base", []),
    (RUN, "base.sha256", MISSING),
    (RUN, "base.bytes", None),
    (RUN, "adapter.final_sha256", 7),
    (RUN, "training.seconds", NAN),
    (RUN, "training.final_loss", float("inf")),
    (RUN, "training.steps_done", 3),
    (RUN, "checks.0.verdict", MISSING),
    (RUN, "template.role_markers", "("),
    (RUN, "settings.training", None),
    (STARTED_FILE, "started", MISSING),
    (STARTED_FILE, "run", []),
    (STARTED_FILE, "run.training", MISSING),
    (STARTED_FILE, "run.lora", "r=8"),
    (STARTED_FILE, "versions.torch", 2.13),
    (STARTED_FILE, "resumes.0", {"at": "2026"}),
    (HELD_OUT, "0.messages", MISSING),
    (HELD_OUT, "0.messages", []),
    (HELD_OUT, "0.messages.1.content", 7),
    (HELD_OUT, "0.messages.1.content", " "),
    (HELD_OUT, "0.messages.0.role", "robot"),
    (METRICS, "step", MISSING),
    (METRICS, "step", "3"),
    (METRICS, "loss", NAN),
    (METRICS, "loss", [1.0]),
    (SCORES, "schema_version", 2),
    (SCORES, "task", "mmlu"),
    (SCORES, "metric", MISSING),
    (SCORES, "metrics", {}),
    (SCORES, "metrics.acc", NAN),
    (SCORES, "seconds", "long"),
    (SCORES, "limit", "none"),
    (SCORES, "docs_sha256", None),
    (SCORES, "wins", 1),
    (DOCS, "score", NAN),
    (DOCS, "score", True),
    (DOCS, "doc_hash", MISSING),
    (DOCS, "answer", None),
    (DOCS, "subjects", "town"),
    (DIVERGENCE, "divergence.mean_kl", NAN),
    (DIVERGENCE, "divergence.tokens", MISSING),
    (DIVERGENCE, "of", []),
    (ERRORS, "layers.0.relative_error", "small"),
    (ERRORS, "layers.0.layer", MISSING),
    (ERRORS, "base_sha256", 7),
    (REPORT, "schema_version", 99),
    (REPORT, "margin", "1"),
    (REPORT, "earlier_margins", MISSING),
    (REPORT, "contrasts.0.overall.interval", [0.0]),
    (REPORT, "contrasts.0.overall.verdict", "fine"),
    (BENCHMARK, "schema_version", 2),
    (BENCHMARK, "margins", [NAN]),
    (BENCHMARK, "margins", MISSING),
    (BENCHMARK, "seeds", ["0"]),
    (BENCHMARK, "limit", "none"),
    (BENCHMARK, "fixed", MISSING),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that a command reads, all of them whole."""
    root = tmp_path_factory.mktemp("whole")
    plan = plan_benchmark(RECIPE, precisions=PRECISIONS, seeds=[0], margin=1.0, flags={"demo": True}, output=root)
    preregister(plan, plan.tasks)
    runs = [RunFolder(make_run(root, name, scores=answers(40))) for name in PRECISIONS]
    for run in runs:
        run.held_out.write_text(json.dumps([{"place": "line 1", "messages": MESSAGES}]))
    write_divergence(runs[1], runs[0], Divergence(900, 0.01, 0.001, 0.2, 97.5))
    write_quantization_error(runs[0], "base-nf4", [LayerError("model.layers.0.q_proj", 0.09)])
    (root / "started").mkdir()
    (root / STARTED_FILE).write_text(json.dumps(STARTED))
    COMMANDS["compare"](root)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for module in (loaded, harness):
        monkeypatch.setattr(module, "restore_base", lambda key: RestoredBase(None, "base-bf16"))
    yield shutil.copytree(whole, tmp_path / "runs")


def refusal(command: str, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command and return the one error that it ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command](root)
    *before, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert error.startswith("error: ") and not [line for line in before if line.startswith(("error", "Traceback"))]
    return error


def edited(content: Any, key: str, value: Any) -> Any:
    """Set a dotted key, or take it out."""
    *path, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    section = content
    for part in path:
        section = section[part]
    if value is MISSING:
        del section[last]
    elif last == len(section):
        section.append(value)
    else:
        section[last] = value
    return content


def test_whole_files_are_no_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["compare"](root)
    assert "report:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "command", "damage"),
    [
        (file, command, damage)
        for file in READERS
        for command in READERS[file]
        for damage in BYTES
        if (file, damage) != (METRICS, "empty")  # a run that logged nothing has an empty one
    ],
)
def test_damage_names_the_file(
    root: Path, capsys: pytest.CaptureFixture[str], file: str, command: str, damage: str
) -> None:
    path = root / file
    path.write_bytes(BYTES[damage](path.read_bytes()))
    assert str(path) in refusal(command, root, capsys)


@pytest.mark.parametrize(("make", "reason"), [(Path.mkdir, "Is a directory"), (os.mkfifo, "it is a pipe, a socket or")])
@pytest.mark.parametrize(("file", "command"), [(file, command) for file in READERS for command in READERS[file]])
def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], file: str, command: str, make: Callable[[Path], None], reason: str
) -> None:
    (root / file).unlink()
    make(root / file)
    assert f"{root / file} cannot be read: {reason}" in refusal(command, root, capsys)


@pytest.mark.parametrize(
    ("file", "command", "key", "value"),
    [(file, command, key, value) for file, key, value in EDITS for command in READERS[file]],
)
def test_an_edit_names_the_file_and_the_key(
    root: Path, capsys: pytest.CaptureFixture[str], file: str, command: str, key: str, value: Any
) -> None:
    path, where = root / file, ""
    if path.suffix == ".jsonl":
        lines, where = path.read_text().splitlines(), ", line 3"
        lines[2] = json.dumps(edited(json.loads(lines[2]), key, value))
        path.write_text("\n".join(lines) + "\n")
        if file == DOCS:  # by somebody who knows of the hash
            scores = edited(json.loads((root / SCORES).read_text()), "docs_sha256", sha256(path.read_text()))
            (root / SCORES).write_text(json.dumps(scores))
    else:
        path.write_text(json.dumps(edited(json.loads(path.read_text()), key, value)))
    named = "0.messages" if file == HELD_OUT else key  # what messages may say is checked by the message
    assert f"{path}{where}, key {named}" in refusal(command, root, capsys)


def test_scores_other_than_the_hash_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / DOCS
    path.write_text(path.read_text().replace('"score": 0.0', '"score": 1.0', 1))
    said = refusal("compare", root, capsys)
    assert f"{path} is not the one that standin_choice.json was written with" in said


def test_a_batch_that_is_none_is_not_restored(root: Path) -> None:
    settings = replace(settings_from(load_recipe(RECIPE), {"demo": True}), auto_fields=frozenset({"batch"}))
    run = {"lora": {}, "training": {"per_device_train_batch_size": "many"}}
    (root / STARTED_FILE).write_text(json.dumps({**STARTED, "run": run}))
    with pytest.raises(RunFolderError, match=r"key run\.training\.per_device_\w+: got 'many', expected int"):
        restore_batch(settings, RunFolder(root / "started"))
