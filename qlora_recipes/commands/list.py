"""`qlora-recipes list`: the recipes of a folder, as they declare themselves. Loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_recipes.commands.flags import Parser
from qlora_recipes.errors import RecipesError, UsageError
from qlora_recipes.fields import Field
from qlora_recipes.recipe import SHIPPED, load_recipe
from qlora_recipes.settings import recipe_name

_FOLDER = Field("folder", "str", "where recipes' files are (default: those that ship)", "FOLDER", default=str(SHIPPED))

_WIDE = 1000  # columns where no terminal has a width


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
    for file in files:
        try:
            recipe = load_recipe(file)
        except RecipesError as error:
            faults.append(str(error))
            continue
        row = (recipe_name(recipe), recipe.model.hub_id, recipe.model.chat_template.path.stem, recipe.dataset.source)
        table.add_row(*map(Text, row))
    if table.row_count == 0:
        raise UsageError("\n".join([f"no file in {folder}/ is a recipe", *faults]))
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(table)
    for fault in faults:
        print(f"left out: {fault}")
