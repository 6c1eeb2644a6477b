"""`qlora-recipes evaluate RUN...`: score runs, and print what came out. Knows nothing of comparisons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_recipes.api import evaluate
from qlora_recipes.commands.flags import GENERATION, OTHER_TEMPLATE, RUNS, TRUST_REMOTE_CODE, Parser, count
from qlora_recipes.commands.quick_imports import quick_imports
from qlora_recipes.fields import Field
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.run.signals import StopSignals

if TYPE_CHECKING:
    from qlora_recipes.evaluation.records import TaskResult

_ABOUT = """Score trained runs with lm-eval and on their held-out rows. Every adapter is loaded from disk, unmerged, \
on the base and in the precision that it was trained in, and proven to be the run's. Finished tasks are kept; an \
interrupted evaluation resumes where it stopped. The processes of `accelerate launch -m qlora_recipes.cli evaluate` \
share the work."""
_TASKS = """standin_choice, standin_answer, standin_text, held_out, held_out_answers, openllm, any task or group of \
lm-eval's, or a folder of YAML tasks (Python functions that they name are run). Default: the recipe's eval_tasks, else \
what needs no network"""
_TEMPLATE = "render prompts with it (default: true, and false for lm-eval's own tasks, as the leaderboard did)"
_NAMES = list(PRECISIONS)
_BY_TASK = ("temperature", "max_new_tokens")
_FLAGS = (
    Field("tasks", "list[str]", _TASKS, "TASK", None),
    count("limit", "the first N documents of each task: for a trial"),
    count("batch_size", "rows of a forward pass (default: 64; 8 from 1B up)"),
    Field("chat_template", "bool", _TEMPLATE, "true|false", None),
    Field("precision", f"Literal{_NAMES}", "control: the adapter on a base stored otherwise", "|".join(_NAMES), None),
    Field("no_adapter", "bool", "control: the base before tuning", default=False),
    *(
        replace(flag, help=f"{flag.help} (default: as the task says)", default=None) if flag.name in _BY_TASK else flag
        for flag in GENERATION
    ),
    OTHER_TEMPLATE,
    TRUST_REMOTE_CODE,
    Field("overwrite", "bool", "replace existing results", default=False),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for anything a user can fix.
    """
    flags = Parser("qlora-recipes evaluate", _ABOUT, {"flags": _FLAGS}, words=RUNS).parse(argv)
    with StopSignals():  # outside of the scoring too a signal ends it with its own exit code
        with quick_imports():
            from qlora_recipes.evaluation.harness import Options  # torch, which --help can do without

        same = ["limit", "batch_size", "chat_template", "precision", "other_template", "trust_remote_code"]
        same += [flag.name for flag in GENERATION]
        options = Options(adapter=not flags["no_adapter"], **{name: flags[name] for name in same})
        results = evaluate(*flags["run"], tasks=flags["tasks"], options=options, overwrite=flags["overwrite"])
        if os.environ.get("RANK", "0") == "0":
            for run, scored in zip(flags["run"], results, strict=True):
                _print_results(run, scored)


def _print_results(run: str, results: Sequence[TaskResult]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(run), title_justify="left", box=None)
    for heading in ("task", "metric", "score", "documents", "seconds", ""):
        table.add_column(heading, justify="left" if heading in ("task", "metric", "") else "right")
    for result in results:
        trial = "NOT A RESULT (--limit)" if result.limit is not None else ""
        cut = f"{result.truncated} truncated" if result.truncated else ""
        table.add_row(
            Text(result.task),
            Text(result.metric),
            f"{result.metrics[result.metric]:.4f}",
            f"{result.n_docs:,}",
            f"{result.seconds:.1f}",
            "; ".join(note for note in (trial, cut) if note),
        )
    Console().print(table)
    once, each = ("base", "run"), ("prompts", "model", "scores")
    took = {name: max(result.seconds_by_part.get(name, 0) for result in results) for name in once}
    took |= {name: sum(result.seconds_by_part.get(name, 0) for result in results) for name in each}
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in took.items())
    Console().print(Text(f" seconds by part: {parts}"))
