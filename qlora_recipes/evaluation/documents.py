"""What a task's scores stand on, known before a model is loaded: its documents, each tried, and its configuration.

Knows nothing of runs.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jinja2 import meta

from qlora_recipes.errors import DataError
from qlora_recipes.evaluation.records import sha256
from qlora_recipes.evaluation.task_loading import EvalTask, reason

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

# Where documents come from, which their own hash tells better, and what lm-eval's `TaskConfig` has for people.
_LEFT_OUT = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "tag", "task_alias", "metadata"}


def identity(task: EvalTask, documents: Iterable[str]) -> dict[str, str]:
    """Return the fields of a TaskResult that tell a task from another of its name, given its documents' hashes."""
    return {"documents_sha256": hash_documents(documents), "config_sha256": hash_config(task)}


def hash_documents(hashes: Iterable[str]) -> str:
    """Return one hash for documents, in their order, from the hash of each."""
    return sha256("\n".join(hashes))


def task_documents(task: EvalTask, limit: int | None) -> list[str]:
    """Return the hash of each document that lm-eval will score, as its samples have it.

    Raises:
        DataError: for a document that makes no question: a field that is missing, a choice of one, a right answer that
            is not among the choices. It names the document.
    """
    return [found for part in task.parts for found in _part_documents(part, limit)]


def _part_documents(part: ConfigurableTask, limit: int | None) -> list[str]:
    from lm_eval.utils import handle_non_serializable

    own = part.config.dataset_path == "json"  # where a missing field is None, which templates render as text
    fields = _fields(part) if own else set()
    hashes = []
    for i, doc in part.doc_iterator(limit=limit):
        where = f"{part.task_name}, document {i}"
        if missing := sorted(field for field in fields if doc[field] is None):
            raise DataError(f"{where}: got no {missing[0]!r}, which the task's YAML names. Add it, empty if need be")
        _check_question(part, doc, where)
        hashes.append(sha256(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)))
    return hashes


def _fields(part: ConfigurableTask) -> set[str]:
    """Return the columns that the task's templates name."""
    from lm_eval.utils import env

    config = part.config
    given = (config.doc_to_text, config.doc_to_target, config.doc_to_choice)
    templates = [text for text in given if isinstance(text, str)]
    named = {name for text in templates for name in meta.find_undeclared_variables(env.parse(text))}
    return (named | set(templates)) & set(part.features)


def _check_question(part: ConfigurableTask, doc: Mapping[str, Any], where: str) -> None:
    try:
        text, target = part.doc_to_text(doc), part.doc_to_target(doc)
        choices = part.doc_to_choice(doc) if part.OUTPUT_TYPE == "multiple_choice" else None
    except Exception as error:  # of a template, or whatever a task's own function fails with
        raise DataError(f"{where}: lm-eval cannot make a question of it: {reason(error)}") from error
    if choices is None or part.config.process_results is not None:  # which alone knows what it takes
        return
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: doc_to_choice gives {choices!r}, expected a list of two or more choices")
    right = text if part.multiple_input else target
    for one in right if isinstance(right, list) else [right]:
        if one not in (range(len(choices)) if isinstance(one, (int, float)) else choices):
            got = f"doc_to_{'text' if part.multiple_input else 'target'} gives {one!r}"
            raise DataError(f"{where}: {got}, expected 0 to {len(choices) - 1} or one of the choices {choices}")


def hash_config(task: EvalTask) -> str:
    """Return one hash for what makes prompts, answers and scores of documents, few-shot examples included.

    It is the same in every process and wherever the files are: functions count by their source.
    """
    return _hashed([_config(part) for part in task.parts])


def _config(part: ConfigurableTask) -> dict[str, Any]:
    config = {name: value for name, value in asdict(part.config).items() if name not in _LEFT_OUT}
    return config | {"fewshot_docs": part.sampler.df if part.config.num_fewshot else []}


def _hashed(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=_plain))


def _plain(value: Any) -> Any:
    """Return what stands for a value that JSON has no form for, without its address in memory."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return _source(value) if callable(value) else str(value)


def _source(function: Callable[..., Any]) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        return inspect.getsource(named)
    except (TypeError, OSError):  # built in, or its file is gone
        return f"{named.__module__}.{named.__qualname__}"
