"""SmolLM3-3B on problems of mathematics, each thought out before its answer."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import messages
from qlora_recipes.models import ModelSpec


class Smollm3Reasoning(Recipe):
    model = ModelSpec("HuggingFaceTB/SmolLM3-3B", family="smollm3")
    dataset = DatasetSpec("open-r1/OpenR1-Math-220k", demo="reasoning")
    training = dict(max_length=8192)  # thoughts of thousands of tokens; shorter rows take less memory, and cut more

    def format_row(self, row):
        return messages({"messages": [with_thoughts(message) for message in row["messages"]]})


def with_thoughts(message):
    """Put thoughts into the answer, where the model's template expects them and this dataset has them."""
    if thoughts := message.get("reasoning_content"):
        return {"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{message['content']}"}
    return message


if __name__ == "__main__":
    Smollm3Reasoning.main()
