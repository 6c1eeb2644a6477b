"""The Python interface: train a recipe, score runs, compare them, ask them. The commands are made of it.

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from qlora_recipes.environment import expandable_segments, quiet_libraries
from qlora_recipes.recipe import Recipe, find_recipe, load_recipe
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import LoggedStep, Receipt
from qlora_recipes.settings import resolve

if TYPE_CHECKING:
    from rich.console import Console

    from qlora_recipes.comparison.findings import Report
    from qlora_recipes.deploy.mixing import MixedRuns
    from qlora_recipes.evaluation.harness import Options
    from qlora_recipes.evaluation.records import TaskResult
    from qlora_recipes.formatters import Message
    from qlora_recipes.memory.estimate import MemoryPlan

__all__ = ["Answering", "Choices", "Run", "compare", "evaluate", "load", "plan", "quiet_libraries", "train"]
MARGIN = 1.0
"""Points. The spread of a leaderboard score from the order of its answers alone is about as large."""


class Choices(TypedDict, total=False):
    """What can be chosen for one run beside its recipe; what is left out is the recipe's, or fitted to the machine."""

    precision: str
    """How the frozen base is stored: nf4 (the default), nf4-single, fp4, int8, bf16 or fp16."""
    dtype: str | None
    """16-bit dtype to load and compute in."""
    storage: str
    """How weights are kept: as stored (`packed`), 4-bit ones dequantized, too (`expanded`), or on a CPU all of them in
    16 bits as they are multiplied (`blocked`); `auto` is the fastest that memory allows."""
    demo: bool
    """Stand-in model and bundled rows, through the same code."""
    model: str | None
    """Another source of the base: a hub id or a folder."""
    dataset: str | None
    """Another source of the rows: a hub id or a file."""
    from_run: str | Path | None
    """A finished run whose adapter is trained further, in place of a new one."""
    output_dir: str | Path | None
    """Run folder; the default is `runs/<recipe>/<precision>-seed<seed>`."""
    lora: Mapping[str, Any]
    """Fields of `peft.LoraConfig`, which override the recipe's."""
    training: Mapping[str, Any]
    """Fields of `trl.SFTConfig`, which override the recipe's."""


@dataclass(frozen=True)
class Run:
    """A run on disk. Every method reads its files, and raises RunFolderError for one that is missing or damaged."""

    path: Path
    """The run folder."""

    def receipt(self) -> Receipt:
        """Return everything that the run can prove about itself."""
        return RunFolder(self.path).receipt()

    def steps(self) -> list[LoggedStep]:
        """Return the logged steps of the training, with the loss of each."""
        return RunFolder(self.path).logged_steps()


def train(
    recipe: type[Recipe] | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    skip_checks: Sequence[str] = (),
    all_checks: bool = False,
    command: Sequence[str] = (),
    console: Console | None = None,
    **choices: Unpack[Choices],
) -> Run:
    """Train a recipe (a class, a file, or the name of one that ships) and return the run, proven.

    `resume` continues from the newest intact checkpoint in the run folder, and `overwrite` replaces the run that is
    there when the new one is finished. `skip_checks` names checks to leave out; the receipt says which. `all_checks`
    shows each on a line. `command` is what the receipt has as the command that was called.

    Raises:
        RecipesError: for anything that would make the run fail, or be something other than it claims.
    """
    expandable_segments()
    from qlora_recipes.training import train as training

    folder = training.train(
        resolve(as_recipe(recipe), **choices),
        command=command,
        overwrite=overwrite,
        resume=resume,
        skip_checks=skip_checks,
        all_checks=all_checks,
        console=console,
    )
    return Run(folder.path)


def plan(recipe: type[Recipe] | str, *, device: str = "cuda", **choices: Unpack[Choices]) -> MemoryPlan:
    """Return the memory that training and evaluation need, in bytes, on `cuda` or `cpu`; loads no weights.

    Raises:
        RecipesError: for a recipe or a model that cannot be read.
    """
    from qlora_recipes.memory.estimate import plan as plan_of

    return plan_of(resolve(as_recipe(recipe), **choices), device=device)


def evaluate(
    *runs: Run | str | Path,
    tasks: Sequence[str] | None = None,
    options: Options | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[list[TaskResult]]:
    """Score runs and return the results of each, in the order of its tasks; results that are there are kept.

    Without `tasks` each run gets its recipe's, or else those that need no network. One base is in memory at a time.

    Raises:
        RecipesError: for a run that is not what its receipt says, or a task that cannot be run.
    """
    from qlora_recipes.evaluation.harness import evaluate_many

    folders = [RunFolder(path_of(run)) for run in runs]
    return evaluate_many(folders, tasks, options=options, overwrite=overwrite, console=console)


def compare(
    *runs: Run | str | Path,
    margin: float = MARGIN,
    output: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    baseline: str | None = None,
    divergence: bool = False,
    other_spread: bool = False,
    command: Sequence[str] = (),
) -> Report:
    """Return what can be said of runs that differ in precision alone, and write it into `output` where it is given.

    `margin` is the largest difference, in points, that still counts as equivalent. Earlier margins of the report in
    `output` are told in the new one. `divergence` loads every arm in turn and measures KL as well. With `other_spread`
    the runs may also have been spread over processes in different ways, with the same rows in every step.

    Raises:
        RecipesError: when the runs differ in more than precision, are not evaluated, or say too little.
    """
    from qlora_recipes.comparison.folders import compare_folders
    from qlora_recipes.report.page import check_report_folder, read_report, write_report

    earlier = None
    if output is not None:
        check_report_folder(Path(output))
        earlier = read_report(Path(output))
    margins = [*earlier.earlier_margins, earlier.margin] if earlier else []
    if margins[-1:] == [margin]:
        margins.pop()
    folders = [path_of(run) for run in runs]
    if divergence:
        _measure_divergence(folders, tasks, baseline, other_spread)
    report = compare_folders(
        folders,
        margin,
        tasks=tasks,
        baseline=baseline,
        other_spread=other_spread,
        earlier_margins=margins,
        command=command,
    )
    if output is not None:
        write_report(report, Path(output))
    return report


@contextmanager
def load(*runs: Run | str | Path, other_template: bool = False, trust_remote_code: bool = False) -> Iterator[Answering]:
    """Load runs of one base for as long as the context lasts, each adapter proven to be the run's.

    `other_template` accepts a chat template that was edited on purpose, `trust_remote_code` a base that brings code.

    Raises:
        RecipesError: for a run that is not what its receipt says, or runs that cannot share a base in memory.
    """
    from qlora_recipes.deploy.mixing import restore_runs

    allowed = {"other_template": other_template, "trust_remote_code": trust_remote_code}
    with restore_runs([RunFolder(path_of(run)) for run in runs], **allowed) as loaded:
        yield Answering(loaded)


@dataclass(frozen=True)
class Answering:
    """Runs in memory on one base, as `load` makes them."""

    runs: MixedRuns

    @property
    def names(self) -> list[str]:
        """What can answer: the runs, and `base` for the base before tuning."""
        return list(self.runs.adapters)

    def answer(
        self, questions: Sequence[str | Sequence[Message]], names: Sequence[str] | None = None, **settings: Any
    ) -> list[str]:
        """Return the answers to questions, or to conversations that end with one, in one batch.

        `names` says for each question who answers it; all go to the first run without. `settings` are those of
        `Generation`: temperature, top_p, top_k, repetition_penalty, max_new_tokens, num_beams, seed.

        Raises:
            RecipesError: for a name that is not loaded, a question that spells a role marker or does not fit.
        """
        from qlora_recipes.deploy.answering import Request, answer
        from qlora_recipes.deploy.mixing import BASE
        from qlora_recipes.evaluation.generation import Generation

        names = names or [next(name for name in self.names if name != BASE)] * len(questions)
        asked = [
            Request([{"role": "user", "content": question}] if isinstance(question, str) else question, name)
            for question, name in zip(questions, names, strict=True)
        ]
        found = answer(self.runs, asked, Generation(**settings), batch_size=len(asked))
        return [each.text for each in found]


def as_recipe(recipe: type[Recipe] | str) -> type[Recipe]:
    """Return a recipe given as a class, a file or a name."""
    return load_recipe(find_recipe(recipe)) if isinstance(recipe, str) else recipe


def path_of(run: Run | str | Path) -> Path:
    """Return the folder of a run given in any form."""
    return run.path if isinstance(run, Run) else Path(run)


def _measure_divergence(
    folders: Sequence[Path], tasks: Sequence[str] | None, baseline: str | None, other_spread: bool
) -> None:
    from qlora_recipes.comparison.folders import read_arms
    from qlora_recipes.evaluation.kl import measure

    arms = read_arms(folders, tasks, baseline, other_spread=other_spread)
    (reference, *seeds), *others = [[run.folder for run in by_seed.values()] for by_seed in arms.values()]
    measure(reference, [*(folders[0] for folders in others), *seeds[:1]], said=print)
