"""Falcon-7b on a question/answer file of your own."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import question_answer
from qlora_recipes.models import FALCON_7B


class FalconFaq(Recipe):
    model = FALCON_7B
    dataset = DatasetSpec("faq.json", format_row=question_answer, demo="faq")  # or --dataset FILE
    training = dict(
        num_train_epochs=3,  # few rows: more passes learn them, and from about five on learn them by heart
        max_length=512,  # answers are a paragraph
    )


if __name__ == "__main__":
    FalconFaq.main()
