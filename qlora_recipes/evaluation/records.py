"""What an evaluation writes to disk: the contract between evaluation and comparison.

A folder of results has, for each task, `<task>.json` (a TaskResult) and `<task>.docs.jsonl` (one DocRecord per line);
its folder `divergence` has how far the run's distributions and stored weights are from those they stand for.
Files in, dataclasses out: knows nothing of models, torch or lm-eval.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from qlora_recipes.errors import CheckError, RecipesError, RunFolderError
from qlora_recipes.run.files import decode_lines, read_bytes, read_record, write_json, write_text
from qlora_recipes.run.folder import RunFolder

SHOWN = 2000  # characters of a prompt, a target or an answer that are kept for people to read
_RESULT, _DOCS = ".json", ".docs.jsonl"
_FIX = "Remove the file and evaluate the run again"
_FIX_DIVERGENCE = "Remove the file and measure again: qlora-recipes compare RUN RUN --divergence"
TOKENS = 2048
"""Held-out tokens that are read; with 32,000 words their log-probabilities take 262 MB on disk."""


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
    choices: int | None = None
    """How many answers there were to choose from; None in tasks that are not multiple choice."""
    picked: int | None = None
    """Place, from 0, of the choice in `answer` among them: the same everywhere from a model that reads no question."""


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
    """From the first prompt rendered to the last document scored."""
    docs_sha256: str = ""
    """Hash of the file of documents, which ties the two files together."""
    documents_sha256: str = ""
    """Hash of the documents asked for, in their order; of the held-out rows, those that did not fit included."""
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    """`base` and `run`: loading and checking them, once for all tasks. Of `seconds`: `prompts` until the model is first
    asked, `model` until it has answered last, `scores` from then on."""
    decoding: str = ""
    """How answers were generated: `greedy`, or what they were drawn with, and every other setting that is not at its
    default (see `generation.Generation`); empty where none is generated."""
    config_sha256: str = ""
    """Hash of what makes prompts and scores of them; see `documents.hash_config`."""
    schema_version: Literal[1] = 1


@dataclass(frozen=True)
class Scores:
    """What was measured in one task: the documents, and fields of its TaskResult."""

    docs: list[DocRecord]
    metrics: dict[str, float]
    higher_is_better: bool
    stderr: dict[str, float] = field(default_factory=dict)
    truncated: int = 0
    prompts_unlike_training: int = 0


class UnfinishedTaskError(RunFolderError):
    """Half a result, as a process that is killed between the two files of a task leaves it."""


def write_task(folder: Path, result: TaskResult, docs: Sequence[DocRecord]) -> TaskResult:
    """Write a task's result, documents first, and return it as written: with the hash of the documents.

    Figures that are not finite, such as the standard error of one document, are left out.

    Raises:
        CheckError: for a score that is not a finite number, naming the document.
    """
    for doc in docs:
        if not math.isfinite(doc.score):
            raise CheckError(
                f"document {doc.doc_id} of {result.task} has the score {doc.score}, expected a finite number. Either "
                "the adapter holds NaN (metrics.jsonl shows grad_norm; train again) or the task's own metric gives it"
            )
    text = "".join(json.dumps(asdict(doc), ensure_ascii=False) + "\n" for doc in docs)
    metrics, stderr = (
        {name: value for name, value in figures.items() if math.isfinite(value)}
        for figures in (result.metrics, result.stderr)
    )
    whole = replace(result, docs_sha256=sha256(text), n_docs=len(docs), metrics=metrics, stderr=stderr)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(_file(folder, result.task, _DOCS), text)
    write_json(_file(folder, result.task, _RESULT), asdict(whole))
    return whole


def read_task(folder: Path, task: str) -> tuple[TaskResult, list[DocRecord]]:
    """Return a task's result and its documents.

    Raises:
        UnfinishedTaskError: when half of it is missing or another evaluation's.
        RunFolderError: when it is damaged, naming the key, and the line among the documents.
    """
    file, docs_file = (_file(folder, task, ending) for ending in (_RESULT, _DOCS))
    try:
        result = read_record(file, TaskResult, fix=_FIX)
        content = read_bytes(docs_file, fix=_FIX)
    except FileNotFoundError as error:
        raise UnfinishedTaskError(
            f"{error.filename} is missing. Evaluate the run first: qlora-recipes evaluate RUN"
        ) from error
    if hashlib.sha256(content).hexdigest() != result.docs_sha256:
        raise UnfinishedTaskError(
            f"{docs_file} is not the one that {task}{_RESULT} was written with. Evaluate {task} again"
        )
    if result.task != task:
        raise RunFolderError(f"{file}, key task: got {result.task!r}, expected {task!r}. {_FIX}")
    if result.metric not in result.metrics:
        raise RunFolderError(
            f"{file}, key metrics: got {', '.join(result.metrics)}, expected {result.metric!r}. {_FIX}"
        )
    docs = decode_lines(content, DocRecord, source=docs_file, fix=_FIX)
    if result.kind == "bits_per_byte" and not all(doc.bits is not None and doc.bytes for doc in docs):
        raise RunFolderError(f"{docs_file}: got documents without bits or bytes, which {task} is scored in. {_FIX}")
    return result, docs


def finished_tasks(folder: Path) -> dict[str, TaskResult]:
    """Return task to result for every task that is whole; half a result is not there.

    Raises:
        RunFolderError: for a result that is damaged.
    """
    found: dict[str, TaskResult] = {}
    for file in sorted(folder.glob(f"*{_DOCS}")):
        with suppress(UnfinishedTaskError):
            result, _ = read_task(folder, unquote(file.name.removesuffix(_DOCS)))
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


@dataclass(frozen=True)
class Divergence:
    """How far an arm's next-token distributions are from the baseline's, on the held-out answers."""

    tokens: int
    mean_kl: float
    """KL(baseline || arm) in nats per token."""
    median_kl: float
    p99_kl: float
    """99th percentile over tokens."""
    same_top_1: float
    """Points: share of tokens whose likeliest successor is the same."""


@dataclass(frozen=True)
class LayerError:
    """What quantization did to one linear layer."""

    layer: str
    relative_error: float
    """Frobenius norm of (stored - original) over that of the original."""


@dataclass(frozen=True)
class _DivergenceFile:
    of: dict[str, Any]
    divergence: Divergence


@dataclass(frozen=True)
class _ErrorFile:
    base_sha256: str
    layers: list[LayerError]


def read_divergence(reference: RunFolder, other: RunFolder) -> Divergence | None:
    """Return a run's distance from the reference; None where it was not measured, or on other weights.

    Raises:
        RunFolderError: when the file is damaged.
    """
    try:
        found = read_record(_divergence_file(reference, other), _DivergenceFile, fix=_FIX_DIVERGENCE)
    except FileNotFoundError:
        return None
    return found.divergence if found.of == _identity(reference, other) else None


def write_divergence(reference: RunFolder, other: RunFolder, found: Divergence) -> None:
    """Write a run's distance from the reference."""
    file = _divergence_file(reference, other)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(_DivergenceFile(_identity(reference, other), found)))


def _divergence_file(reference: RunFolder, other: RunFolder) -> Path:
    return other.evaluation / "divergence" / f"from-{reference.receipt().adapter.final_sha256[:16]}.json"


def _identity(reference: RunFolder, other: RunFolder) -> dict[str, Any]:
    """What the figure depends on; anything else there is another measurement's."""
    one, two = reference.receipt(), other.receipt()
    return {
        "reference": [one.adapter.final_sha256, one.base.sha256],
        "run": [two.adapter.final_sha256, two.base.sha256],
        "data": two.data.fingerprint,
        "tokens": TOKENS,
    }


def read_quantization_error(folder: RunFolder) -> list[LayerError]:
    """Return the error of each quantized layer of a run's base, in the model's order; empty where not measured.

    Raises:
        RunFolderError: when the file is damaged.
    """
    try:
        found = read_record(_error_file(folder), _ErrorFile, fix=_FIX_DIVERGENCE)
    except FileNotFoundError:
        return []
    return found.layers if found.base_sha256 == folder.receipt().base.sha256 else []


def write_quantization_error(folder: RunFolder, base_sha256: str, layers: Sequence[LayerError]) -> None:
    """Write the error of each quantized layer of a run's base."""
    file = _error_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(_ErrorFile(base_sha256, list(layers))))


def _error_file(folder: RunFolder) -> Path:
    return folder.evaluation / "divergence" / "quantization_error.json"
