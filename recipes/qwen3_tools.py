"""Qwen3-8B on calls of functions."""

import json

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import messages
from qlora_recipes.models import ModelSpec


class Qwen3Tools(Recipe):
    model = ModelSpec("Qwen/Qwen3-8B", family="qwen3")
    dataset = DatasetSpec("Salesforce/xlam-function-calling-60k", demo="tools")  # gated: accept its terms on the hub
    training = dict(
        max_length=2048,  # descriptions of functions are long, and a row without its end teaches no call
    )

    def format_row(self, row):
        if "messages" in row:  # rows in OpenAI's shape, as the demo's
            return messages(row)
        calls = [{"type": "function", "function": call} for call in json.loads(row["answers"])]
        return messages(
            {
                "messages": [
                    {"role": "user", "content": row["query"]},
                    {"role": "assistant", "content": "", "tool_calls": calls},
                ],
                "tools": [{"type": "function", "function": tool} for tool in json.loads(row["tools"])],
            }
        )


if __name__ == "__main__":
    Qwen3Tools.main()
