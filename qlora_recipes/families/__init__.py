"""The dimensions of a decoder of any architecture: computed where a family has a file here, else counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_recipes.errors import UnreadableModelError
from qlora_recipes.families import outline
from qlora_recipes.families.falcon import FALCON
from qlora_recipes.families.family import Family, Sizes
from qlora_recipes.families.llama import LLAMA, MISTRAL

FAMILIES: dict[str, Family] = {name: family for family in (LLAMA, MISTRAL, FALCON) for name in family.model_types}
"""`model_type` -> family with arithmetic of its own."""


def sizes_from(
    config: Mapping[str, Any], location: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> Sizes:
    """Return the dimensions that the `config.json` of a model states; those counted take a second, and import torch.

    Raises:
        UnreadableModelError: when they cannot be read.
        ModelError: when it is no decoder of text that Transformers can make.
    """
    family = FAMILIES.get(config["model_type"])
    if family is None or not family.covers(config):
        return outline.count(config, location, revision, trust_remote_code=trust_remote_code)
    try:
        return family.sizes_of(config)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UnreadableModelError(f"cannot load {location}: dimensions in config.json: {error!r}") from error
