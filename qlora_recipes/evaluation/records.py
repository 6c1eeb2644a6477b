"""What an evaluation writes to disk: the contract between evaluation and comparison.

A folder of results has, for each task, `<task>.json` (a TaskResult) and `<task>.docs.jsonl` (one DocRecord per line).
Files in, dataclasses out: knows nothing of models, torch or lm-eval.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from qlora_recipes.errors import CheckError, RecipesError, RunFolderError
from qlora_recipes.run.files import write_json, write_text

SCHEMA_VERSION = 1
SHOWN = 2000  # characters of a prompt, a target or an answer that are kept for people to read
_RESULT, _DOCS = ".json", ".docs.jsonl"
_Record = TypeVar("_Record", "TaskResult", "DocRecord")


@dataclass(frozen=True)
class DocRecord:
    """How one document was answered."""

    task: str
    subject: str | None
    """The part of the task that the document belongs to and shares its difficulty with; None without parts."""
    doc_id: str
    """Its place in the task, for people; the hashes identify it."""
    doc_hash: str
    """SHA-256 of the document."""
    prompt_hash: str
    """SHA-256 of what the model was given."""
    target_hash: str
    """SHA-256 of what was expected of it."""
    score: float
    """The task's primary metric on this document."""
    answer: str
    """The choice that was picked or the text that was generated; empty for text that is only scored."""
    target: str
    prompt: str
    """What the model was given; only its end when it is long."""
    bits: float | None = None
    """Negative log2-likelihood of the text, in tasks that score text."""
    bytes: int | None = None
    """Length of that text in UTF-8, in the same tasks."""


@dataclass(frozen=True)
class TaskResult:
    """The scores of one run in one task, and what they were measured on."""

    task: str
    kind: str
    """`accuracy` (every score is 0 or 1), `bits_per_byte`, `generation` or `score` (other numbers)."""
    metric: str
    """The primary metric: that of the documents' scores."""
    higher_is_better: bool
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    """Standard errors of the metrics that have one, with documents taken as independent."""
    n_docs: int
    limit: int | None
    """The number of documents asked for; a result with a limit is a trial and never counts."""
    num_fewshot: int
    chat_template: bool
    """Whether the prompts were rendered with the chat template."""
    template_sha256: str | None
    """Hash of that template; None without it."""
    prompts_unlike_training: int
    """Prompts whose tokens differ from those that training gives the same messages."""
    truncated: int
    """Requests that were longer than the model's context and lost their beginning, or were left out."""
    batch_size: int
    loglikelihood_dtype: str
    """The dtype that log-likelihoods are computed and summed in."""
    version: str
    """The task's own version."""
    precision: str
    """How the base was stored when it was scored."""
    base_sha256: str
    adapter_sha256: str | None
    """Hash of the weights that were scored; None for the base alone."""
    adapter_on_off_difference: float | None
    """Largest difference that the adapter makes to a logit of the run's own prompts; None without an adapter."""
    device: str
    seconds: float
    docs_sha256: str = ""
    """Hash of the file of documents, which ties the two files together."""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Scores:
    """What was measured in one task, without the facts about the run."""

    docs: list[DocRecord]
    metrics: dict[str, float]
    higher_is_better: bool
    stderr: dict[str, float] = field(default_factory=dict)
    truncated: int = 0
    prompts_unlike_training: int = 0


def write_task(folder: Path, result: TaskResult, docs: Sequence[DocRecord]) -> TaskResult:
    """Write a task's result, documents first, and return it with the hash of the documents.

    Raises:
        CheckError: for a score that is not a finite number, naming the document.
    """
    _check_finite(result.task, docs)
    text = "".join(json.dumps(asdict(doc), ensure_ascii=False) + "\n" for doc in docs)
    whole = replace(result, docs_sha256=sha256(text), n_docs=len(docs))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(_file(folder, result.task, _DOCS), text)
    write_json(_file(folder, result.task, _RESULT), asdict(whole))
    return whole


def read_task(folder: Path, task: str) -> tuple[TaskResult, list[DocRecord]]:
    """Return a task's result and its documents.

    Raises:
        RunFolderError: when it is missing, damaged or half of it is another evaluation's.
        CheckError: for a score that is not a finite number, naming the document.
    """
    result = _read_result(_file(folder, task, _RESULT))
    file = _file(folder, task, _DOCS)
    text = _read(file)
    if sha256(text) != result.docs_sha256:
        raise RunFolderError(f"{file} is not the one that {task}{_RESULT} was written with. Evaluate {task} again")
    lines = text.split("\n")[:-1]  # splitlines would also cut at the line separators that a text may hold
    docs = [_record(DocRecord, json.loads(line), file) for line in lines]
    _check_finite(task, docs)
    return result, docs


def finished_tasks(folder: Path) -> dict[str, TaskResult]:
    """Return task to result for every task that is whole; what is missing or damaged is not there."""
    found: dict[str, TaskResult] = {}
    for file in sorted(folder.glob(f"*{_RESULT}")):
        try:
            result, _ = read_task(folder, unquote(file.name.removesuffix(_RESULT)))
        except (RunFolderError, CheckError):
            continue
        found[result.task] = result
    return found


def sha256(text: str) -> str:
    """Return the SHA-256 of a text, as records hold it."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def disk_faults(folder: Path, advice: str) -> Iterator[None]:
    """Turn an error of the file system within the block into one of ours.

    Raises:
        RunFolderError: naming the folder, the system's reason and the fix.
    """
    try:
        yield
    except RecipesError:
        raise
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error.strerror or error}. {advice}") from error


def _file(folder: Path, task: str, ending: str) -> Path:
    """Return the file of a task, whose name is quoted so that it stays inside the folder."""
    return folder / (quote(task, safe="").replace(".", "%2E") + ending)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunFolderError(f"{file} is missing. Evaluate the run first: qlora-recipes evaluate RUN") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}. Evaluate the run again with --overwrite") from error


def _read_result(file: Path) -> TaskResult:
    try:
        content = json.loads(_read(file))
    except ValueError as error:
        raise RunFolderError(f"{file} is no JSON: {error}. Evaluate the run again with --overwrite") from error
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise RunFolderError(f"{file} is no result of schema {SCHEMA_VERSION}. Evaluate the run again with --overwrite")
    return _record(TaskResult, content, file)


def _record(kind: type[_Record], content: Any, file: Path) -> _Record:
    names = {entry.name for entry in fields(kind)}
    if not isinstance(content, dict) or content.keys() != names:
        got = ", ".join(sorted(names ^ set(content))) if isinstance(content, dict) else repr(content)[:60]
        raise RunFolderError(f"{file} has other fields than a {kind.__name__}: {got}. Evaluate the run again")
    return kind(**content)


def _check_finite(task: str, docs: Sequence[DocRecord]) -> None:
    for doc in docs:
        if not math.isfinite(doc.score):
            raise CheckError(
                f"document {doc.doc_id} of {task} has the score {doc.score}, expected a finite number; look for NaN in "
                "the adapter (metrics.jsonl shows grad_norm) and train again"
            )
