"""From a loaded run and a task to scores: lm-eval asks and scores, this module keeps each document's answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.evaluator import evaluate

from qlora_recipes.errors import DataError
from qlora_recipes.evaluation.bar import Bar, silence_lm_eval
from qlora_recipes.evaluation.language_model import RunLanguageModel
from qlora_recipes.evaluation.loaded import RestoredRun
from qlora_recipes.evaluation.records import SHOWN, DocRecord, Scores
from qlora_recipes.evaluation.task_loading import EvalTask

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

SEED = 1234  # lm-eval's own, for the choice of few-shot examples
_BOOTSTRAP = 1000  # draws for the standard error of the few metrics that have no formula; 0 would drop every other too


def score_with_lm_eval(
    run: RestoredRun, task: EvalTask, *, batch_size: int, limit: int | None, chat_template: bool, bar: Bar
) -> Scores:
    """Return what lm-eval makes of a run in one task.

    `lm_eval.evaluate` and not `simple_evaluate`, which does no more for a loaded model, but runs `pip list` each time.

    Raises:
        DataError: when the task's metric gives no number for a document.
    """
    for part in task.parts:
        part.set_fewshot_seed(SEED)
    with silence_lm_eval():
        model = RunLanguageModel(run, batch_size, bar)
        outcome = evaluate(
            model,
            {"tasks": {part.task_name: part for part in task.parts}, "groups": {}, "group_map": {}},
            limit=limit,
            cache_requests=False,  # its key leaves out the task's own text, and old prompts are served
            bootstrap_iters=_BOOTSTRAP,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    docs = [
        _record(task, part, sample)
        for part in task.parts
        for sample in _read_first_way(outcome["samples"][part.task_name])
    ]
    metrics, stderr = _aggregates(task, outcome, docs)
    return Scores(
        docs=docs,
        metrics=metrics,
        stderr=stderr,
        higher_is_better=_higher_is_better(task, outcome),
        truncated=model.truncated,
        prompts_unlike_training=model.prompts_unlike_training,
    )


def _read_first_way(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A task can read each answer in several ways, its filters; the first listed is the strict one."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _record(task: EvalTask, part: ConfigurableTask, sample: Mapping[str, Any]) -> DocRecord:
    doc_id, doc = sample["doc_id"], sample["doc"]
    alone = len(task.parts) == 1
    subject = doc.get("subject") if alone else part.task_name
    answer, target, prompt = _shown(task, part, sample)
    bits, length = _text_bits(part, sample) if task.kind == "bits_per_byte" else (None, None)
    return DocRecord(
        task=task.name,
        subject=None if subject is None else str(subject),
        doc_id=str(doc_id) if alone else f"{part.task_name}/{doc_id}",
        doc_hash=sample["doc_hash"],
        prompt_hash=sample["prompt_hash"],
        target_hash=sample["target_hash"],
        score=_number(task, sample) if bits is None else bits / length,
        answer=answer[:SHOWN],
        target=target[:SHOWN],
        prompt=prompt[-SHOWN:],
        bits=bits,
        bytes=length,
    )


def _text_bits(part: ConfigurableTask, sample: Mapping[str, Any]) -> tuple[float, int]:
    return -sample["filtered_resps"][0] / math.log(2), len(str(part.doc_to_target(sample["doc"])).encode())


def _number(task: EvalTask, sample: Mapping[str, Any]) -> float:
    value = sample.get(task.metric)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(
            f"{task.name}: the metric {task.metric} gives {value!r} for document {sample['doc_id']}, expected a "
            "number; "
            "list a metric with one number a document first in the task's metric_list, such as acc or exact_match"
        ) from None


def _shown(task: EvalTask, part: ConfigurableTask, sample: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return answer, target and prompt as a person reads them."""
    doc, given = sample["doc"], str(sample["arguments"][0][0])
    if task.kind == "bits_per_byte":
        return "", str(part.doc_to_target(doc)), ""
    if part.OUTPUT_TYPE != "multiple_choice":
        first = sample["filtered_resps"][0]
        return str(first[0] if isinstance(first, (list, tuple)) else first), str(sample["target"]), given
    choices = part.doc_to_choice(doc)
    right = part.doc_to_text(doc) if part.multiple_input else sample["target"]
    return choices[_picked(task.metric, choices, sample)], _choice_text(choices, right), given


def _picked(metric: str, choices: Sequence[str], sample: Mapping[str, Any]) -> int:
    """Return the choice that the metric's own rule picks."""
    lengths = {
        "acc_norm": [len(choice) for choice in choices],
        "acc_bytes": [len(c.encode()) for c in choices],
    }
    per = lengths.get(metric, [1] * len(choices))
    responses = sample["filtered_resps"][: len(choices)]
    scores = [response[0] / length for response, length in zip(responses, per, strict=True)]
    return scores.index(max(scores))


def _choice_text(choices: Sequence[str], right: Any) -> str:
    if isinstance(right, (list, tuple)):
        return " or ".join(_choice_text(choices, one) for one in right)
    return choices[right] if isinstance(right, int) and right < len(choices) else str(right)


def _aggregates(
    task: EvalTask, outcome: Mapping[str, Any], docs: Sequence[DocRecord]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return lm-eval's own figures for a single task; the parts of a group are pooled, each document counting once."""
    if task.kind == "bits_per_byte":
        pooled = sum(doc.bits or 0 for doc in docs) / sum(doc.bytes or 0 for doc in docs)
    else:
        pooled = sum(doc.score for doc in docs) / len(docs)
    if len(task.parts) > 1:
        return {task.metric: pooled}, {}
    name = task.parts[0].task_name
    way = outcome["samples"][name][0]["filter"]
    figures = {
        key.removesuffix(f",{way}"): value
        for key, value in outcome["results"][name].items()
        if key.endswith(f",{way}") and isinstance(value, (int, float))
    }
    stderr = {key.removesuffix("_stderr"): float(value) for key, value in figures.items() if key.endswith("_stderr")}
    metrics = {key: float(value) for key, value in figures.items() if not key.endswith("_stderr")}
    return {task.metric: pooled, **metrics}, stderr


def _higher_is_better(task: EvalTask, outcome: Mapping[str, Any]) -> bool:
    said = outcome["higher_is_better"][task.parts[0].task_name].get(task.metric)
    return task.kind != "bits_per_byte" if said is None else bool(said)
