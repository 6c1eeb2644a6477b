"""gpt-oss-20b on thoughts in five languages."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import ModelSpec


class GptOssReasoning(Recipe):
    model = ModelSpec("unsloth/gpt-oss-20b-BF16", family="gpt_oss")  # OpenAI's own is quantized already, to MXFP4
    dataset = DatasetSpec("HuggingFaceH4/Multilingual-Thinking", demo="reasoning")
    lora = dict(r=8, lora_alpha=16)  # those of OpenAI's cookbook for this dataset
    training = dict(max_length=2048)  # likewise


if __name__ == "__main__":
    GptOssReasoning.main()
