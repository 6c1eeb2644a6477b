"""`qlora-recipes list`: the recipes of a folder, as they declare themselves. Loads nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_recipes.commands.flags import Parser
from qlora_recipes.errors import RecipesError, UsageError
from qlora_recipes.fields import Field
from qlora_recipes.models import ModelSpec
from qlora_recipes.recipe import SHIPPED, load_recipe
from qlora_recipes.settings import recipe_name

_FOLDER = Field("folder", "str", "where recipes' files are (default: those that ship)", "FOLDER", default=str(SHIPPED))

_WIDE = 1000  # columns where no terminal has a width
_SECONDS = 10  # for one file, and for Python to start


def main(argv: Sequence[str]) -> None:
    """Print one line for each recipe of a folder."""
    flags = Parser("qlora-recipes list", "List the recipes of a folder.", {}, words=_FOLDER).parse(argv)
    folder = Path(flags["folder"])
    files = sorted(folder.glob("*.py"))
    if not files:
        raise UsageError(f"no recipe in {folder}/; expected a folder of Python files that each declare one")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("recipe", "model", "template", "dataset"):
        table.add_column(title, overflow="fold")
    faults = []
    for found in _described(files):
        if isinstance(found, str):
            faults.append(found)
        else:
            table.add_row(*map(Text, found))
    if table.row_count == 0:
        raise UsageError("\n".join([f"no file in {folder}/ is a recipe", *faults]))
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(table)
    for fault in faults:
        print(f"left out: {fault}")


def _described(files: Sequence[Path]) -> Iterator[list[str] | str]:
    """Yield what is listed of each file, or in a sentence why it is not.

    The files are programs: they are read in a process of their own, and in another one after a file that ended it.
    """
    spawn, left = multiprocessing.get_context("spawn"), list(files)
    while left:
        ours, theirs = spawn.Pipe(duplex=False)
        reader = spawn.Process(target=_describe, args=(left, theirs), daemon=True)
        reader.start()
        theirs.close()  # or its end is not seen when the reader is gone
        why = f"takes longer than {_SECONDS} seconds to read"
        try:
            while left and ours.poll(_SECONDS):
                found = ours.recv()
                del left[0]
                yield found
        except EOFError:
            why = "ends the program"
        reader.kill()
        reader.join()
        if left:
            yield f"{left.pop(0)}: the recipe's file {why}. Fix it there"


def _describe(files: Sequence[Path], answers: Connection) -> None:
    for file in files:
        try:
            recipe = load_recipe(file)
        except RecipesError as error:
            answers.send(str(error))
            continue
        spec = recipe.model
        sources = " + ".join(dataset.source for dataset in recipe.datasets())
        answers.send([recipe_name(recipe), spec.hub_id, _template(spec), sources])


def _template(spec: ModelSpec) -> str:
    return spec.chat_template.name.removesuffix(".jinja") if spec.chat_template else "the tokenizer's"
