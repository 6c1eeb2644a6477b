"""Llama-3.1-8B-Instruct on ten thousand conversations that people wrote."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import ModelSpec


class Llama3NoRobots(Recipe):
    model = ModelSpec("meta-llama/Llama-3.1-8B-Instruct", family="llama3")  # gated: accept its terms on the hub
    dataset = DatasetSpec("HuggingFaceH4/no_robots", demo="chat")  # for non-commercial use
    lora = dict(r=64, lora_alpha=16)  # QLoRA's choice for 7B; a smaller r saves memory and loses little
    training = dict(max_length=2048)  # longer rows are cut; the model itself takes 131,072


if __name__ == "__main__":
    Llama3NoRobots.main()
