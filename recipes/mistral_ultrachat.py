"""Mistral-7B-Instruct-v0.3 on UltraChat, with the settings that made Zephyr of Mistral-7B."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import ModelSpec


class MistralUltrachat(Recipe):
    model = ModelSpec("mistralai/Mistral-7B-Instruct-v0.3", family="mistral")
    dataset = DatasetSpec("HuggingFaceH4/ultrachat_200k", split="train_sft", demo="chat")
    lora = dict(r=16, lora_alpha=16, lora_dropout=0.05)  # huggingface/alignment-handbook, zephyr-7b-beta, QLoRA
    training = dict(max_length=2048)  # likewise; longer conversations are cut


if __name__ == "__main__":
    MistralUltrachat.main()
