"""Instruction-tuning recipes on TRL that prove what they did."""

from qlora_recipes.chat_templates import ChatTemplate
from qlora_recipes.models import ModelSpec
from qlora_recipes.recipe import DatasetSpec, Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["ChatTemplate", "DatasetSpec", "ModelSpec", "Recipe", "load_recipe"]
