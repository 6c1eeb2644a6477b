"""Qwen3-8B on problems of mathematics, each thought out before its answer."""

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import messages
from qlora_recipes.models import ModelSpec


class Qwen3Reasoning(Recipe):
    model = ModelSpec("Qwen/Qwen3-8B", family="qwen3")
    dataset = DatasetSpec("open-r1/OpenR1-Math-220k", demo="reasoning")
    training = dict(max_length=8192)  # thoughts of thousands of tokens; shorter rows take less memory, and cut more

    def format_row(self, row):
        *before, answer = row["messages"]
        thoughts, closed, said = answer["content"].partition("</think>")
        if closed:  # this dataset writes thoughts into the answer; the template takes them beside it
            answer = {"role": "assistant", "content": said, "reasoning_content": thoughts.removeprefix("<think>")}
        return messages({"messages": [*before, answer]})


if __name__ == "__main__":
    Qwen3Reasoning.main()
