"""SmolLM3-3B on problems of mathematics, each thought out before its answer."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import ModelSpec


class Smollm3Reasoning(Recipe):
    model = ModelSpec("HuggingFaceTB/SmolLM3-3B", family="smollm3")
    dataset = DatasetSpec("open-r1/OpenR1-Math-220k", demo="reasoning")
    training = dict(
        max_length=8192,  # thoughts of thousands of tokens; one that is cut teaches no end. Memory grows with it
    )


if __name__ == "__main__":
    Smollm3Reasoning.main()
