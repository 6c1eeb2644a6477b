"""Llama-2-7b-chat on pairs of answers, of which it learns to prefer one (DPO); start it from a run: --from_run."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import LLAMA_2_7B_CHAT


class Llama2Preferences(Recipe):
    model = LLAMA_2_7B_CHAT
    dataset = DatasetSpec("trl-lib/ultrafeedback_binarized", demo="preferences")
    method = "dpo"
    training = dict(
        learning_rate=5e-6,  # a tenth of what SFT takes: the answers are there already
        beta=0.1,  # a smaller one lets the model move further from where it starts
        max_length=1024,
    )


if __name__ == "__main__":
    Llama2Preferences.main()
