"""Llama-2-7b-chat on a thousand Guanaco conversations, LoRA on all linear layers."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import guanaco_llama2
from qlora_recipes.models import LLAMA_2_7B_CHAT


class Llama2Guanaco(Recipe):
    model = LLAMA_2_7B_CHAT
    dataset = DatasetSpec("mlabonne/guanaco-llama2-1k", format_row=guanaco_llama2, demo="guanaco_llama2")
    lora = dict(r=64, lora_alpha=16)  # QLoRA's choice for 7B; a smaller r saves memory and loses little
    training = dict(max_length=2048)  # three conversations of a thousand are longer


if __name__ == "__main__":
    Llama2Guanaco.main()
