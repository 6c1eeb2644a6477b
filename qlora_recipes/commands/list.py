"""`qlora-recipes list`: the recipes of a folder, as they declare themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_recipes.errors import UsageError
from qlora_recipes.recipe import load_recipe
from qlora_recipes.settings import recipe_name


def main(arguments: Sequence[str]) -> None:
    """Print one line for each recipe of a folder."""
    parser = argparse.ArgumentParser(prog="qlora-recipes list", description="List the recipes of a folder.")
    parser.add_argument("folder", nargs="?", default="recipes", help="where the recipe files are (default: recipes/)")
    folder = Path(parser.parse_args(arguments).folder)
    files = sorted(folder.glob("*.py"))
    if not files:
        raise UsageError(f"no recipe in {folder}/; expected a folder of Python files that each declare one")
    table = Table("recipe", "model", "template", "dataset", box=None, padding=(0, 2, 0, 0))
    for recipe in map(load_recipe, files):
        row = (recipe_name(recipe), recipe.model.hub_id, recipe.model.chat_template.path.stem, recipe.dataset.source)
        table.add_row(*map(Text, row))
    Console().print(table)
