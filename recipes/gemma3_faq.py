"""Gemma 3, the text model of 1B, on a question/answer file of your own."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import question_answer
from qlora_recipes.models import ModelSpec


class Gemma3Faq(Recipe):
    model = ModelSpec("google/gemma-3-1b-it", family="gemma3")  # gated; those of 4B and more also read pictures
    dataset = DatasetSpec("faq.json", format_row=question_answer, demo="faq")  # or --dataset FILE
    training = dict(
        num_train_epochs=3,  # few rows: more passes learn them, and from about five on learn them by heart
        max_length=512,  # answers are a paragraph; also the window of most of its layers
    )


if __name__ == "__main__":
    Gemma3Faq.main()
