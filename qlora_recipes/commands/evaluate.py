"""`qlora-recipes evaluate RUN...`: score runs, and print what came out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qlora_recipes.errors import UsageError, nearest
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.run.signals import StopSignals

if TYPE_CHECKING:
    from qlora_recipes.evaluation.records import TaskResult

_DESCRIPTION = """Score trained runs with lm-eval and on their held-out rows. Every adapter is loaded from disk, \
unmerged, on the base and in the precision that it was trained in, and proven to be the run's. Finished tasks are \
kept; an interrupted evaluation goes on where it stopped."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: --")[2].split(" ")[0].split("=")[0]
        flags = [action.dest for action in self._actions]
        raise UsageError(f"evaluate: {message}.{nearest(unknown, flags) if unknown else ''}")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for anything a user can mend.
    """
    given = _parser().parse_args(list(arguments))
    with StopSignals():  # outside of the scoring too a signal ends it with its own exit code
        _evaluate(given)


def _evaluate(given: argparse.Namespace) -> None:
    from qlora_recipes.evaluation.harness import Options, evaluate_many  # torch, which --help can do without
    from qlora_recipes.run.folder import RunFolder

    options = Options(
        limit=given.limit,
        batch_size=given.batch_size,
        chat_template=given.chat_template,
        adapter=not given.no_adapter,
        precision=given.precision,
        other_template=given.other_template,
        trust_remote_code=given.trust_remote_code,
    )
    folders = [RunFolder(Path(run)) for run in given.run]
    results = evaluate_many(folders, given.tasks, options=options, overwrite=given.overwrite)
    for folder, scored in zip(folders, results, strict=True):
        _print_results(folder.path, scored)


def _parser() -> _Parser:
    parser = _Parser(prog="qlora-recipes evaluate", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", nargs="+", metavar="RUN", help="run folder, such as runs/falcon_faq/nf4-seed0")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="standin_choice, standin_answer, standin_text, held_out, held_out_answers, openllm, any task or group of "
        "lm-eval's, or a folder of YAML tasks (Python functions that they name are run). Default: the recipe's "
        "eval_tasks, else what needs no network",
    )
    parser.add_argument("--limit", type=_count, metavar="N", help="the first N documents of each task: for a trial")
    parser.add_argument(
        "--batch_size", type=_count, metavar="N", help="rows of a forward pass (default: 64; 8 from 1B up)"
    )
    parser.add_argument(
        "--chat_template",
        type=_truth,
        metavar="true|false",
        help="render prompts with it (default: true, and false for lm-eval's own tasks, as the leaderboard did)",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="control: the adapter on a base stored otherwise")
    parser.add_argument("--no_adapter", action="store_true", help="control: the base before tuning")
    parser.add_argument("--other_template", action="store_true", help="take a chat template edited after training")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code of a base trained with it")
    parser.add_argument("--overwrite", action="store_true", help="replace results that stand already")
    return parser


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}, expected a whole number from 1 up")
    return int(word)


def _truth(word: str) -> bool:
    if word not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {word!r}, expected true or false")
    return word == "true"


def _print_results(run: Path, results: Sequence[TaskResult]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(run)), title_justify="left", box=None)
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
