"""Scores runs with lm-eval and on their held-out rows, each loaded from disk and proven to be itself.

A task that is finished is not run again; the next command goes on where the last one was interrupted.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from qlora_recipes.errors import RunFolderError, UsageError
from qlora_recipes.evaluation.bar import Bar
from qlora_recipes.evaluation.held_out import score_answers, score_held_out
from qlora_recipes.evaluation.loaded import BaseKey, RestoredRun, check_remote_code, restore_base, restore_run
from qlora_recipes.evaluation.records import Scores, TaskResult, finished_tasks, write_task
from qlora_recipes.evaluation.task_loading import HELD_OUT_TASKS, STANDIN_TASKS, EvalTask, checked_limit, load_tasks
from qlora_recipes.evaluation.writing import disk_faults
from qlora_recipes.precision import precision_named
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.run.signals import Stopped, StopSignals

# Of a stand-in and of a model of billions: larger is faster where memory allows. Never "auto", which may choose another
# size for each arm, and with it other roundings.
_SMALL, _BATCHES = 10**9, (64, 8)


@dataclass(frozen=True)
class Options:
    """How runs are scored. Two evaluations of equal options give the same numbers."""

    limit: int | None = None
    """Only the first documents of each task: for a trial, whose result never counts."""
    batch_size: int | None = None
    """Rows of one forward pass; None for one that suits the size of the base."""
    chat_template: bool | None = None
    """Whether prompts are rendered with it; None leaves it to each task."""
    adapter: bool = True
    """False scores the base before tuning."""
    precision: str | None = None
    """Another storage of the base than the run was trained on: training effect against inference effect."""
    other_template: bool = False
    """Take a chat template that was edited after training; its hash is recorded in the results."""
    trust_remote_code: bool = False
    """Allow the base of a run that was trained so to run its own code; nothing else is allowed by it."""

    def __post_init__(self) -> None:
        checked_limit(self.limit)
        if self.batch_size is not None and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise UsageError(f"batch_size: got {self.batch_size!r}, expected a fixed number of rows, such as 8")
        if self.precision is not None:
            precision_named(self.precision)

    def control(self, receipt: Receipt) -> str:
        """Return the name of the control that this is, or an empty string for the run as it was trained."""
        elsewhere = self.precision not in (None, receipt.precision)
        return "-".join(
            part for part in ("" if self.adapter else "base", f"on-{self.precision}" if elsewhere else "") if part
        )

    def batch(self, receipt: Receipt) -> int:
        """Return the fixed batch size."""
        return self.batch_size or _BATCHES[receipt.base.parameters >= _SMALL]


@dataclass(frozen=True)
class _Job:
    """One run with what is left to be done for it."""

    folder: RunFolder
    receipt: Receipt
    key: BaseKey
    output: Path
    tasks: list[str]
    """Names as asked for."""


def evaluate(
    folder: RunFolder,
    tasks: Sequence[str] | None = None,
    *,
    options: Options | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[TaskResult]:
    """Score one run and return its results, in the order of the tasks; see `evaluate_many`."""
    return evaluate_many([folder], tasks, options=options, overwrite=overwrite, console=console)[0]


def evaluate_many(
    folders: Sequence[RunFolder],
    tasks: Sequence[str] | None = None,
    *,
    options: Options | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[list[TaskResult]]:
    """Score runs, those of one base on the same loaded base, and write every task's result as it is finished.

    Without `tasks` each run gets its `default_tasks`. Everything that can be refused is refused before a model is
    loaded. A signal ends it between two writes, and says what is finished.

    Raises:
        RecipesError: for a run that is not what its receipt says, a task that cannot be run, or results of other
            options that `overwrite` does not allow to replace.
        Stopped: when SIGTERM or SIGINT came.
    """
    options = options or Options()
    jobs = [_job(folder, tasks, options) for folder in folders]
    loaded = load_tasks(list(dict.fromkeys(name for job in jobs for name in job.tasks)))
    expected = [_once(task for name in job.tasks for task in loaded[name]) for job in jobs]
    results: list[dict[str, TaskResult]] = [
        {} if overwrite else _finished(job, todo, options) for job, todo in zip(jobs, expected, strict=True)
    ]
    try:
        with StopSignals("what is being written is whole") as signals:
            _score_missing(jobs, expected, results, options, signals, console or Console(stderr=True))
    except Stopped as stopped:
        _say_what_is_left(stopped, jobs, expected, results, overwrite)
        raise
    return [[results[i][task.name] for task in expected[i]] for i in range(len(jobs))]


def _score_missing(
    jobs: Sequence[_Job],
    expected: Sequence[Sequence[EvalTask]],
    results: Sequence[dict[str, TaskResult]],
    options: Options,
    signals: StopSignals,
    console: Console,
) -> None:
    """Score what of the expected tasks has no result yet, one base in memory at a time."""
    for key in dict.fromkeys(job.key for job in jobs):
        mine = [i for i, job in enumerate(jobs) if job.key == key]
        if any(task.name not in results[i] for i in mine for task in expected[i]):
            base = restore_base(key)
            for i in mine:
                missing = [task for task in expected[i] if task.name not in results[i]]
                if missing:
                    with restore_run(
                        jobs[i].folder, base, key, adapter=options.adapter, other_template=options.other_template
                    ) as run:
                        _score(run, missing, options, jobs[i].output, results[i], signals, console)
            del base
            gc.collect()  # before the next base needs the room


def _say_what_is_left(
    stopped: Stopped,
    jobs: Sequence[_Job],
    expected: Sequence[Sequence[EvalTask]],
    results: Sequence[Mapping[str, TaskResult]],
    overwrite: bool,
) -> None:
    lines = []
    for job, todo, done in zip(jobs, expected, results, strict=True):
        finished = [task.name for task in todo if task.name in done]
        left = [task.name for task in todo if task.name not in done]
        lines.append(f"  {job.output}: finished {', '.join(finished) or 'none'}, left {', '.join(left) or 'none'}")
    again = "does all of them again (--overwrite)" if overwrite else "goes on with the tasks that are left"
    print(f"stopped by {stopped.signal.name}; the same command {again}", *lines, sep="\n", file=sys.stderr)


def default_tasks(receipt: Receipt) -> list[str]:
    """Return the tasks that a run is scored on unless told otherwise."""
    held_out = receipt.data.rows_held_out > 0
    if receipt.demo:
        return [*STANDIN_TASKS, *HELD_OUT_TASKS[: 1 if held_out else 0]]
    declared = receipt.settings.eval_tasks
    if not declared and not held_out:
        raise UsageError("the run kept no rows and its recipe names no eval_tasks; give --tasks, such as --tasks mmlu")
    return declared or list(HELD_OUT_TASKS)


def _once(tasks: Iterable[EvalTask]) -> list[EvalTask]:
    found: dict[str, EvalTask] = {}
    for task in tasks:
        if task.name in found:
            raise UsageError(f"the task {task.name} is asked for twice; its results would lie in one file")
        found[task.name] = task
    return list(found.values())


def _job(folder: RunFolder, tasks: Sequence[str] | None, options: Options) -> _Job:
    receipt = folder.receipt()
    check_remote_code(receipt, allowed=options.trust_remote_code)
    return _Job(
        folder=folder,
        receipt=receipt,
        key=BaseKey.of(receipt, options.precision),
        output=folder.evaluation / options.control(receipt),
        tasks=list(tasks) if tasks else default_tasks(receipt),
    )


def _finished(job: _Job, tasks: Sequence[EvalTask], options: Options) -> dict[str, TaskResult]:
    """Return the results that stand already, and refuse to replace those of other options."""
    found = finished_tasks(job.output)
    standing = {task.name: found[task.name] for task in tasks if task.name in found}
    for task in tasks:
        if task.name in standing:
            _check_same_options(standing[task.name], task, job, options)
    return standing


def _check_same_options(result: TaskResult, task: EvalTask, job: _Job, options: Options) -> None:
    asked = {
        "limit": options.limit,
        "batch_size": options.batch(job.receipt),
        "chat_template": _chat_template(task, options),
        "num_fewshot": _shots(task),
        "version": _version(task),
        "adapter_sha256": job.receipt.adapter.final_sha256 if options.adapter else None,
    }
    for name, value in asked.items():
        if getattr(result, name) != value:
            raise RunFolderError(
                f"{job.output} holds {task.name} with {name} {getattr(result, name)}, now {value} is asked for. "
                "Give --overwrite to replace it"
            )


def _score(
    run: RestoredRun,
    tasks: Sequence[EvalTask],
    options: Options,
    output: Path,
    results: dict[str, TaskResult],
    signals: StopSignals,
    console: Console,
) -> None:
    """Score one run in its missing tasks, and write each and add it to the results as it is finished."""
    for task in tasks:
        started = time.monotonic()
        with Bar(task.name, console) as bar:
            scores = _measure(run, task, options, bar)
        result = TaskResult(
            task=task.name,
            kind=task.kind,
            metric=task.metric,
            higher_is_better=scores.higher_is_better,
            metrics=scores.metrics,
            stderr=scores.stderr,
            n_docs=len(scores.docs),
            limit=options.limit,
            num_fewshot=_shots(task),
            chat_template=_chat_template(task, options),
            template_sha256=run.encoder.template.sha256 if _chat_template(task, options) else None,
            prompts_unlike_training=scores.prompts_unlike_training,
            truncated=scores.truncated,
            batch_size=options.batch(run.receipt),
            loglikelihood_dtype="float32",
            version=_version(task),
            precision=run.precision,
            base_sha256=run.base_sha256,
            adapter_sha256=run.adapter_sha256,
            adapter_on_off_difference=run.adapter_on_off_difference,
            device=run.model.device.type,
            seconds=round(time.monotonic() - started, 3),
        )
        with signals.held(), disk_faults(output, "Make room or make it writable; the same command does what is left"):
            results[task.name] = write_task(output, result, scores.docs)


def _shots(task: EvalTask) -> int:
    return max((part.config.num_fewshot or 0 for part in task.parts), default=0)


def _version(task: EvalTask) -> str:
    return str(task.parts[0].VERSION) if task.parts else "1"


def _chat_template(task: EvalTask, options: Options) -> bool:
    """Text that is only scored has no prompt to render; held-out rows are always rendered as in training."""
    if not task.parts:
        return True
    if task.kind == "bits_per_byte" or options.chat_template is None:
        return task.chat_template
    return options.chat_template


def _measure(run: RestoredRun, task: EvalTask, options: Options, bar: Bar) -> Scores:
    batch_size = options.batch(run.receipt)
    if task.name == "held_out":
        return score_held_out(run, batch_size=batch_size, limit=options.limit, bar=bar)
    if task.name == "held_out_answers":
        return score_answers(run, batch_size=batch_size, limit=options.limit, bar=bar)
    from qlora_recipes.evaluation.lm_eval_scores import score_with_lm_eval  # seconds to import

    chat_template = _chat_template(task, options)
    return score_with_lm_eval(
        run, task, batch_size=batch_size, limit=options.limit, chat_template=chat_template, bar=bar
    )
