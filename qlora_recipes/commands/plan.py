"""`qlora-recipes plan RECIPE`: what a recipe would do, and the memory it would take in every precision.

Loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qlora_recipes.commands.recipe_cli import parse_with_recipe, settings_from
from qlora_recipes.fields import Field
from qlora_recipes.memory.table import print_plan
from qlora_recipes.recipe import load_recipe

_IS_MEMORY: dict[str, Any] = dict(
    valid=lambda gib: 0 < gib < math.inf, expected="the memory of a GPU in GiB, such as 24"
)
_GPU = "memory of a GPU: as it is sold (16, 24, 40, 48, 80), or as PyTorch reports it"
_IS_COUNT: dict[str, Any] = dict(valid=lambda number: number > 0, expected="a number of GPUs, such as 8")
_FLAGS = (
    Field("gpu", "float", _GPU, "GIB", None, **_IS_MEMORY),
    Field("processes", "int", "GPUs of the run, to see how it can be spread over them", "N", None, **_IS_COUNT),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for what a user can fix.
    """
    about = "Print what a recipe would do and the memory it would take, in every precision."
    flags = parse_with_recipe("qlora-recipes plan", about, _FLAGS, argv)
    settings = settings_from(load_recipe(flags["recipe"]), flags)
    print_plan(settings, gpu_gib=flags["gpu"], processes=flags["processes"])
