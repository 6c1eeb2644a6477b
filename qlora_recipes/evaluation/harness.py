"""Scores runs with lm-eval and on their held-out rows; finished tasks are kept. Knows nothing of comparisons."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from qlora_recipes import environment
from qlora_recipes.errors import DataError, RunFolderError, UsageError
from qlora_recipes.evaluation.answers import write_before_and_after
from qlora_recipes.evaluation.bar import Bar
from qlora_recipes.evaluation.documents import identity, task_documents
from qlora_recipes.evaluation.generation import Generation, check_generation, own_defaults
from qlora_recipes.evaluation.held_out import hash_conversation, score_answers, score_held_out, score_preferences
from qlora_recipes.evaluation.loaded import (
    BaseKey,
    RestoredBase,
    RestoredRun,
    check_remote_code,
    read_held_out,
    restore_base,
    restore_run,
)
from qlora_recipes.evaluation.ranks import from_first_rank, writes
from qlora_recipes.evaluation.records import Scores, TaskResult, disk_faults, finished_tasks, write_task
from qlora_recipes.evaluation.task_loading import PREFERENCES, EvalTask, load_tasks, usual_tasks
from qlora_recipes.precision import precision_named
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.run.signals import Stopped, StopSignals

_OTHER = {
    "documents_sha256": "scored on other documents than the task has now",
    "config_sha256": "scored with other prompts, choices, few-shot examples or metrics than the task has now",
}
_GENERATION = tuple(Generation.__dataclass_fields__)


@dataclass(frozen=True)
class Options:
    """How runs are scored. Two evaluations with equal options give the same numbers."""

    limit: int | None = None
    """Only the first documents of each task: for a trial, whose result never counts."""
    batch_size: int | None = None
    """Rows in one forward pass; None chooses by the size of the base."""
    chat_template: bool | None = None
    """Whether prompts are rendered with it; None leaves it to each task."""
    adapter: bool = True
    """False scores the base before tuning."""
    precision: str | None = None
    """Score on a base stored in another precision, to tell the effect on training from that on inference."""
    temperature: float | None = None
    """Of the words that are drawn for an answer; 0 takes the likeliest, None does so too unless the task draws."""
    top_p: float = 1.0
    """The share of probability that the words drawn from make up."""
    top_k: int = 0
    """How many of the likeliest words are drawn from; 0 does not limit them."""
    repetition_penalty: float = 1.0
    """Divides the logits of words that are there already; 1 leaves them."""
    max_new_tokens: int | None = None
    """Where an answer is cut; None cuts it where the task says, and held-out answers at 256."""
    num_beams: int = 1
    """Continuations kept beside each other."""
    seed: int = 0
    """Of what is drawn."""
    other_template: bool = False
    """Accept a chat template that was edited after training; its hash is recorded in the results."""
    trust_remote_code: bool = False
    """Allow a base that was trained with its own code to run it again; no other base may."""

    def __post_init__(self) -> None:
        for name, value, unit in (("limit", self.limit, "documents"), ("batch_size", self.batch_size, "rows")):
            # lm-eval would take 1.0 for one document and 0.5 for half of them.
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name}: got {value!r}, expected a whole number of {unit}, such as 8")
        if self.precision is not None:
            precision_named(self.precision)
        check_generation({name: getattr(self, name) for name in _GENERATION})

    @property
    def generation(self) -> Generation:
        """The settings of generated answers, where the task says nothing of them."""
        given = {name: getattr(self, name) for name in _GENERATION}
        return Generation(**{name: value for name, value in given.items() if value is not None})

    def control(self, receipt: Receipt) -> str:
        """Return the name of the control that this is, or an empty string for the run as it was trained."""
        elsewhere = self.precision not in (None, receipt.precision)
        parts = ("" if self.adapter else "base", f"on-{self.precision}" if elsewhere else "")
        return "-".join(part for part in parts if part)

    def decoding(self, task: EvalTask) -> str:
        """Return how answers are generated, as a TaskResult has it."""
        if not task.generates:
            return ""
        said = str(self.generation)
        drawn = self.temperature is None and task.samples
        return said.replace("greedy", f"as the task draws, seed {self.seed}") if drawn else said

    def decoded(self) -> dict[str, Any]:
        """Return what takes the place of a task's own decoding: everything with a temperature, else what is set."""
        chosen, usual = self.generation.arguments(), Generation().arguments()
        return {name: value for name, value in chosen.items() if self.temperature is not None or value != usual[name]}

    def batch(self, receipt: Receipt) -> int:
        """Return a size known beforehand; lm-eval's "auto" may choose another, and so other rounding, for each arm."""
        return self.batch_size or (64 if receipt.base.parameters < 10**9 else 8)


@dataclass(frozen=True)
class _Job:
    """One run, the tasks that it is scored on, and the results that it has so far."""

    folder: RunFolder
    receipt: Receipt
    options: Options
    tasks: list[EvalTask]
    identities: dict[str, dict[str, str]]
    """Task to the hashes of its documents and of its configuration."""
    results: dict[str, TaskResult]

    @property
    def key(self) -> BaseKey:
        return BaseKey.of(self.receipt, self.options.precision)

    @property
    def output(self) -> Path:
        return self.folder.evaluation / self.options.control(self.receipt)

    @property
    def missing(self) -> list[EvalTask]:
        return [task for task in self.tasks if task.name not in self.results]

    def conditions(self, task: EvalTask) -> dict[str, Any]:
        """Return the fields of a TaskResult that must be equal for one result to stand for another."""
        return {
            "limit": self.options.limit,
            "batch_size": self.options.batch(self.receipt),
            "chat_template": task.rendered(self.options.chat_template),
            "num_fewshot": task.num_fewshot,
            "version": task.version,
            "adapter_sha256": self.receipt.adapter.final_sha256 if self.options.adapter else None,
            "metric": task.metric,
            "decoding": self.options.decoding(task),
            **self.identities[task.name],
        }


def evaluate_many(
    folders: Sequence[RunFolder],
    tasks: Sequence[str] | None = None,
    *,
    options: Options | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[list[TaskResult]]:
    """Score runs, each base loaded once and one at a time, and write each task's result as it is finished.

    The processes of a launcher share the batches out, and the first of them writes what one alone would have written.
    Without `tasks` each run gets its `default_tasks`. Everything that can be rejected is rejected before a model is
    loaded. A signal ends the evaluation between two writes and prints what is finished.

    Raises:
        RecipesError: for a run that is not what its receipt says, a task that cannot be run, or results with other
            options that `overwrite` does not allow to replace.
        Stopped: on SIGTERM or SIGINT.
    """
    if environment.processes_here() > 1:
        environment.share_threads()
    options = options or Options()
    console = (console or Console(stderr=True)) if writes() else Console(quiet=True)
    receipts = [folder.receipt() for folder in folders]
    for receipt in receipts:
        check_remote_code(receipt, allowed=options.trust_remote_code)
    names = [tasks or default_tasks(receipt) for receipt in receipts]
    loaded = load_tasks(list(dict.fromkeys(name for asked in names for name in asked)))
    of_lm_eval = {task for tasks in loaded.values() for task in tasks if task.parts}
    shared = {task: identity(task, task_documents(task, options.limit)) for task in of_lm_eval}
    jobs = [
        _job(folder, receipt, options, [task for name in asked for task in loaded[name]], shared)
        for folder, receipt, asked in zip(folders, receipts, names, strict=True)
    ]
    for job in jobs:
        if not overwrite:
            _take_finished(job)
        job.results.update(from_first_rank(job.results))
    try:
        with StopSignals("the results being written are complete") as signals:
            for key in dict.fromkeys(job.key for job in jobs if job.missing):
                started = time.monotonic()
                base = restore_base(key)
                loading = time.monotonic() - started
                for job in jobs:
                    if job.key == key and job.missing:
                        _score(job, base, loading, signals, console)
                del base  # or the next one, which frees what nothing holds, would find it in memory
    except Stopped as stopped:
        _print_what_is_left(stopped, jobs, overwrite)
        raise
    for job in (job for job in jobs if writes() and "held_out_answers" in job.results):
        with disk_faults(job.folder.evaluation, "The results are whole; only answers.md is missing"):
            write_before_and_after(job.folder.evaluation)
    return [[job.results[task.name] for task in job.tasks] for job in jobs]


def _job(
    folder: RunFolder,
    receipt: Receipt,
    options: Options,
    tasks: list[EvalTask],
    shared: Mapping[EvalTask, dict[str, str]],
) -> _Job:
    """Make a job of a run; `shared` has the identity of every task that is not of the run's own rows."""
    if twice := [name for name, times in Counter(task.name for task in tasks).items() if times > 1]:
        raise UsageError(f"the task {twice[0]} is asked for twice; its results would be one file")
    rows = read_held_out(folder)
    if not rows and (own := [task.name for task in tasks if not task.parts]):
        raise DataError(
            f"{folder.path} kept no rows from training; set DatasetSpec(held_out=0.05) and train again, or leave "
            f"{own[0]} out of --tasks"
        )
    kept = [hash_conversation(row) for row in rows[: options.limit]]
    identities = {task.name: shared.get(task) or identity(task, kept) for task in tasks}
    return _Job(folder, receipt, options, tasks, identities, {})


def _print_what_is_left(stopped: Stopped, jobs: Sequence[_Job], overwrite: bool) -> None:
    again = "does all of them again (--overwrite)" if overwrite else "resumes with the tasks that are left"
    print(f"stopped by {stopped.signal.name}; the same command {again}", file=sys.stderr)
    for job in jobs:
        left = ", ".join(task.name for task in job.missing) or "none"
        finished = ", ".join(task.name for task in job.tasks if task.name in job.results) or "none"
        print(f"  {job.output}: finished {finished}, left {left}", file=sys.stderr)


def default_tasks(receipt: Receipt) -> list[str]:
    """Return the tasks that a run is scored on unless told otherwise.

    Raises:
        UsageError: when the recipe declares none and no rows were held out.
    """
    held_out, preferences = receipt.data.rows_held_out > 0, receipt.settings.method == "dpo"
    tasks = usual_tasks(receipt.demo, receipt.settings.eval_tasks, held_out=held_out, preferences=preferences)
    only_texts = bool(receipt.data.contents) and "assistant" not in receipt.data.contents  # which ask nothing
    return [task for task in tasks if not (only_texts and task == "held_out_answers")]


def _take_finished(job: _Job) -> None:
    """Take the results that are on disk already, and refuse to mix them with others."""
    found = finished_tasks(job.output)
    for task in job.tasks:
        if result := found.get(task.name):
            for name, expected in job.conditions(task).items():
                if (got := getattr(result, name)) != expected:
                    said = _OTHER.get(name, f"with {name} {got}, now {expected} is asked for")
                    raise RunFolderError(f"{job.output} holds {task.name} {said}. Give --overwrite to replace it")
            job.results[task.name] = result


def _score(job: _Job, base: RestoredBase, loading: float, signals: StopSignals, console: Console) -> None:
    """Score one run in its missing tasks, and write each result as it is finished; the base took `loading` seconds."""
    options, entered = job.options, time.monotonic()
    with restore_run(job.folder, base, job.key, adapter=options.adapter, other_template=options.other_template) as run:
        restoring = time.monotonic() - entered
        if any(task.generates for task in job.missing) and (own := own_defaults(run.model)):
            console.print(Text(f"the model's own generation defaults, not used: {own}"))
        for task in job.missing:
            started = time.monotonic()
            bar = Bar(task.name, console)
            with bar.progress, torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed)
                scores = _measure(run, task, options, bar)
            ended = time.monotonic()
            parts = {"base": loading, "run": restoring, "prompts": bar.started - started}
            parts |= {"model": bar.moved - bar.started, "scores": ended - bar.moved}
            conditions = job.conditions(task)
            result = TaskResult(
                **conditions | {"adapter_sha256": run.adapter_sha256},  # as measured in the loaded model
                **{name: value for name, value in vars(scores).items() if name != "docs"},
                task=task.name,
                kind=_kind(task, scores),
                n_docs=len(scores.docs),
                template_sha256=run.encoder.template.sha256 if conditions["chat_template"] else None,
                loglikelihood_dtype="float32",
                precision=run.precision,
                base_sha256=run.base_sha256,
                adapter_on_off_difference=run.adapter_on_off_difference,
                device=run.model.device.type,
                seconds=round(ended - started, 3),
                seconds_by_part={name: round(seconds, 3) for name, seconds in parts.items()},
            )
            if not writes():
                job.results[task.name] = result
                continue
            with signals.held(), disk_faults(job.output, "Free some space or make it writable, then resume"):
                job.results[task.name] = write_task(job.output, result, scores.docs)


def _kind(task: EvalTask, scores: Scores) -> str:
    right_or_wrong = all(doc.score in (0, 1) for doc in scores.docs)
    return "score" if task.kind == "accuracy" and not right_or_wrong else task.kind


def _measure(run: RestoredRun, task: EvalTask, options: Options, bar: Bar) -> Scores:
    batch_size = options.batch(run.receipt)
    if task.name == "held_out":
        return score_held_out(run, batch_size=batch_size, limit=options.limit, bar=bar)
    if task.name == PREFERENCES:
        return score_preferences(run, batch_size=batch_size, limit=options.limit, bar=bar)
    if task.name == "held_out_answers":
        return score_answers(run, batch_size=batch_size, limit=options.limit, bar=bar, settings=options.generation)
    from qlora_recipes.evaluation.lm_eval_model import score_with_lm_eval  # seconds to import

    return score_with_lm_eval(
        run,
        task,
        batch_size=batch_size,
        limit=options.limit,
        chat_template=task.rendered(options.chat_template),
        decoded=options.decoded(),
        max_new_tokens=options.max_new_tokens if task.generates else None,
        bar=bar,
    )
