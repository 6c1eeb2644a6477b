"""Qwen3-8B on calls of functions."""

import json

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.formatters import messages
from qlora_recipes.models import ModelSpec


class Qwen3Tools(Recipe):
    model = ModelSpec("Qwen/Qwen3-8B", family="qwen3")
    dataset = DatasetSpec("Salesforce/xlam-function-calling-60k", demo="tools")  # gated: accept its terms on the hub
    training = dict(max_length=2048)  # descriptions of functions are long; a row that is cut teaches no call

    def format_row(self, row):
        if "messages" in row:  # OpenAI's shape, as the rows of the demo have it
            return messages(row)
        question = {"role": "user", "content": row["query"]}
        answer = {"role": "assistant", "tool_calls": json.loads(row["answers"])}
        return {"messages": [question, answer], "tools": row["tools"]}


if __name__ == "__main__":
    Qwen3Tools.main()
