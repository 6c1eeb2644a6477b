"""SmolLM3-3B on the conversations that were made for small models."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import ModelSpec


class Smollm3Smoltalk(Recipe):
    model = ModelSpec("HuggingFaceTB/SmolLM3-3B", family="smollm3")
    dataset = DatasetSpec("HuggingFaceTB/smol-smoltalk", demo="chat")
    training = dict(max_length=2048)  # longer rows are cut; the model itself takes 65,536


if __name__ == "__main__":
    Smollm3Smoltalk.main()
