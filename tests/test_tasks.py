"""Tasks of your own: what a result stands on, and what is refused before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_run

from qlora_recipes.errors import DataError, RecipesError, RunFolderError
from qlora_recipes.evaluation import harness
from qlora_recipes.evaluation.documents import hash_config, hash_documents, task_documents
from qlora_recipes.evaluation.harness import Options, evaluate_many
from qlora_recipes.evaluation.records import DocRecord, Scores, TaskResult, read_task
from qlora_recipes.evaluation.task_loading import EvalTask, load_tasks
from qlora_recipes.run.folder import RunFolder

ROWS = [{"q": "Is it?", "a": "yes"}, {"q": "Was it?", "a": "no"}, {"q": "Will it be?", "a": "no"}]
YAML = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": ["yes", "no"],
    "doc_to_target": "a",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_folder(folder: Path, rows: list[Any] | str = ROWS, **changes: Any) -> Path:
    """Write a task; a change to None leaves the key out, and rows as text are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    task = {name: value for name, value in {**YAML, **changes}.items() if value is not None}
    (folder / "mine.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


def load(folder: Path) -> EvalTask:
    (task,) = load_tasks([str(folder)])[str(folder)]
    return task


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TaskResult]:
    """Return a function that evaluates one run on a folder, with a model that gives each document the score 1."""
    run = RunFolder(make_run(tmp_path, "nf4"))

    def score(job: harness._Job, *_: Any) -> None:
        for task in job.missing:
            hashes = task_documents(task, job.options.limit)
            docs = [DocRecord(task.name, None, str(i), it, "", "", 1.0, "", "", "") for i, it in enumerate(hashes)]
            result = replace(_RESULT, task=task.name, **job.conditions(task))
            job.results[task.name] = harness.write_task(job.output, result, docs)

    monkeypatch.setattr(harness, "restore_base", lambda key: None)
    monkeypatch.setattr(harness, "_score", score)

    def evaluate(folder: Path, limit: int | None = None, **flags: Any) -> TaskResult:
        return evaluate_many([run], [str(folder)], options=Options(limit=limit), **flags)[0][0]

    return evaluate


_RESULT = TaskResult(
    task="mine", kind="accuracy", metric="acc", higher_is_better=True, metrics={"acc": 1.0, "exact_match": 1.0},
    stderr={}, n_docs=0, limit=None, num_fewshot=0, chat_template=True, template_sha256="t", prompts_unlike_training=0,
    truncated=0, batch_size=8, loglikelihood_dtype="float32", version="1", precision="nf4", base_sha256="b",
    adapter_sha256="a", adapter_on_off_difference=0.5, device="cpu", seconds=1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (ROWS[:2], {}, "mine scored on other documents than the task has now"),
        (ROWS[::-1], {}, "mine scored on other documents than the task has now"),
        (ROWS, {"metric_list": [{"metric": "exact_match"}]}, "mine with metric acc, now exact_match is asked for"),
        (ROWS, {"doc_to_text": "Say: {{q}}"}, "mine scored with other prompts, choices"),
        (ROWS, {"metadata": {"version": 2}}, "mine with version Yaml, now 2 is asked for"),
        (ROWS, {"num_fewshot": 1}, "mine with num_fewshot 0, now 1 is asked for"),
    ],
)
def test_another_task_of_the_same_name_does_not_get_the_scores_of_the_first(
    rows: list[Any], changes: dict[str, Any], said: str, scored: Callable[..., TaskResult], tmp_path: Path
) -> None:
    first = scored(write_folder(tmp_path / "one"))
    other = write_folder(tmp_path / "two", rows, **changes)
    with pytest.raises(RunFolderError, match=rf"evaluation holds {said}.*\. Give --overwrite to replace it"):
        scored(other)
    assert scored(write_folder(tmp_path / "moved")) == first  # the same task elsewhere: the kept result
    assert scored(other, overwrite=True) != first


def test_documents_are_those_that_are_scored(scored: Callable[..., TaskResult], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine")
    whole, trial = scored(folder), scored(folder, limit=2, overwrite=True)
    assert whole.documents_sha256 != trial.documents_sha256
    assert trial.documents_sha256 == scored(write_folder(tmp_path / "first", ROWS[:2]), 2).documents_sha256
    _, docs = read_task(tmp_path / "nf4-seed0" / "evaluation", "mine")
    assert hash_documents(doc.doc_hash for doc in docs) == trial.documents_sha256


CODE = "def text(doc):\n    return doc['q'].upper()\n"
HASHED = "import sys; from test_tasks import load, hash_config, Path; print(hash_config(load(Path(sys.argv[1]))))"


def test_the_hash_of_a_configuration_is_that_of_another_process_and_place(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / name, num_fewshot=1, doc_to_text=None) for name in ("one", "two")]
    for folder in folders:
        (folder / "code.py").write_text(CODE)
        yaml = (folder / "mine.yaml").read_text()
        (folder / "mine.yaml").write_text(yaml.replace('{"task"', '{"doc_to_text": !function code.text, "task"'))
    here = [hash_config(load(folder)) for folder in folders]
    words = [sys.executable, "-c", HASHED, str(folders[1])]
    there = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert here == [there.stdout.strip()] * 2
    (folders[0] / "code.py").write_text(CODE.replace("upper", "lower  "))
    (folders[1] / "rows.jsonl").write_text(json.dumps({"q": "Other?", "a": "no"}) + "\n")  # of its one-shot examples
    assert len({here[0], *(hash_config(load(folder)) for folder in folders)}) == 3


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ("", {}, r"rows\.jsonl has no rows; expected at least one"),
        ('{"q": "Is it?", "a": "yes"}\n{"q": \n', {}, r"rows\.jsonl, line 2, column 1: broken JSON"),
        ([*ROWS, {"q": "No answer?"}], {}, "mine, document 3: got no 'a', which the task's YAML names"),
        ([*ROWS, {"a": "no"}], {}, "mine, document 3: got no 'q', which the task's YAML names"),
        (ROWS, {"doc_to_text": "{{question}}"}, "lm-eval cannot make a task of it: UndefinedError: 'question'"),
        (ROWS, {"doc_to_text": "{{1 // (q | length - 7)}}"}, "document 1: lm-eval cannot make a question of it"),
        (ROWS, {"doc_to_choice": ["yes"], "doc_to_target": 0}, r"gives \['yes'\], expected a list of two or more"),
        (ROWS, {"doc_to_target": "{{2 if a == 'no' else 0}}"}, "document 1: doc_to_target gives 2, expected 0 to 1 or"),
        (ROWS, {"doc_to_target": "{{a.upper()}}"}, r"document 0: doc_to_target gives 'YES', .* one of the choices"),
        (ROWS, {"test_split": None}, "must have valid or test docs"),
        (ROWS, {"test_split": "tset"}, "lm-eval cannot make a task of it: KeyError: 'tset'"),
        (ROWS, {"metric_list": [{"aggregation": "mean"}]}, "'metric' key not provided"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_before_a_base_is_loaded(
    rows: Any, changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(make_run(tmp_path, "nf4"))
    monkeypatch.setattr(harness, "restore_base", lambda key: pytest.fail("loaded a base"))
    with pytest.raises(RecipesError, match=said) as error:
        evaluate_many([run], [str(write_folder(tmp_path / "mine", rows, **changes))])
    assert "\n" not in str(error.value) and not run.evaluation.exists()


def test_documents_that_a_function_leaves_none_of_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine")
    (folder / "code.py").write_text("def none(docs):\n    return docs.filter(lambda doc: False)\n")
    yaml = (folder / "mine.yaml").read_text()
    (folder / "mine.yaml").write_text(yaml.replace('{"task"', '{"process_docs": !function code.none, "task"'))
    with pytest.raises(DataError, match="no documents"):
        task_documents(load(folder), None)


def test_held_out_tasks_without_rows_are_refused_before_a_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "restore_base", lambda key: pytest.fail("loaded a base"))
    with pytest.raises(DataError, match=r"kept no rows from training.* leave held_out out of --tasks"):
        evaluate_many([RunFolder(make_run(tmp_path, "nf4"))], ["held_out"])


@pytest.mark.parametrize(("scores", "kind"), [([0.0, 1.0], "accuracy"), ([0.0, 0.5], "score"), ([1.0, 2.0], "score")])
def test_scores_that_are_not_all_0_or_1_are_no_accuracy(scores: list[float], kind: str, tmp_path: Path) -> None:
    docs = [DocRecord("mine", None, str(i), "", "", "", score, "", "", "") for i, score in enumerate(scores)]
    task = load(write_folder(tmp_path / "mine"))
    assert harness._kind(task, Scores(docs, {"acc": 0.5}, higher_is_better=True)) == kind
