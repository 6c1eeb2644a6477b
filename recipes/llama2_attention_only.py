"""Llama-2-7b-chat on Guanaco, LoRA on the query and value projections alone, as in the LoRA paper."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import guanaco_llama2
from qlora_recipes.models import LLAMA_2_7B_CHAT


class Llama2AttentionOnly(Recipe):
    model = LLAMA_2_7B_CHAT
    dataset = DatasetSpec("mlabonne/guanaco-llama2-1k", format_row=guanaco_llama2, demo="guanaco_llama2")
    lora = dict(
        target_modules=["q_proj", "v_proj"],  # arXiv 2106.09685, section 7.1; less memory, and less is learnt
        r=8,  # the paper's
    )
    training = dict(max_length=2048)  # longer rows are cut


if __name__ == "__main__":
    Llama2AttentionOnly.main()
