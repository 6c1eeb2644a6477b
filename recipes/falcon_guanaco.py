"""Falcon-7b on OpenAssistant-Guanaco."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import guanaco_text
from qlora_recipes.models import FALCON_7B


class FalconGuanaco(Recipe):
    model = FALCON_7B
    dataset = DatasetSpec("timdettmers/openassistant-guanaco", format_row=guanaco_text, demo="openassistant_guanaco")
    lora = dict(r=64, lora_alpha=16)  # QLoRA's choice for 7B; a smaller r saves memory and loses little
    training = dict(max_length=2048)  # the longest Falcon-7b was trained on


if __name__ == "__main__":
    FalconGuanaco.main()
