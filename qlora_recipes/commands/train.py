"""`qlora-recipes train RECIPE`: the recipe's own command line, for a recipe by name or by file, in one process."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_recipes.commands.recipe_cli import parse, parse_with_recipe, run
from qlora_recipes.recipe import find_recipe, load_recipe


def main(argv: Sequence[str]) -> None:
    """Train a recipe; with `--help` after its name, show its flags.

    Raises:
        RecipesError: for what a user can fix.
    """
    if argv[:1] and not argv[0].startswith("-") and {"-h", "--help"} & set(argv):
        parse(load_recipe(find_recipe(argv[0])), argv[1:], f"qlora-recipes train {argv[0]}")
    flags = parse_with_recipe("qlora-recipes train", "Train a recipe in this process.", (), argv)
    run(load_recipe(flags["recipe"]), flags, ["qlora-recipes", "train", *argv])
