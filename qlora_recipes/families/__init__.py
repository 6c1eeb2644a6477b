"""The decoder architectures that are known, one file each, found by the `model_type` of `config.json`."""

from __future__ import annotations

from qlora_recipes.errors import ModelError
from qlora_recipes.families.falcon import FALCON
from qlora_recipes.families.family import Family
from qlora_recipes.families.llama import LLAMA

FAMILIES: dict[str, Family] = {name: family for family in (LLAMA, FALCON) for name in family.model_types}
"""`model_type` -> family."""


def family_of(model_type: str) -> Family:
    """Return the family of a `model_type`.

    Raises:
        ModelError: naming the known ones.
    """
    if model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not known, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
