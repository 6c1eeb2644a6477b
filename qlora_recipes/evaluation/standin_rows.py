"""The bundled data about the stand-ins' world, as lm-eval's `custom_dataset` takes it: without a path or a cache.

Knows nothing of models.
"""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset, DatasetDict

from qlora_recipes.standins import HELD_OUT_TEXT, QUESTIONS


def questions(**_: Any) -> DatasetDict:
    """Return the held-out questions, each choice with a space, for prompts without a chat template."""
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return _test_split([row | {"choices": [f" {choice}" for choice in row["choices"]]} for row in rows])


def documents(**_: Any) -> DatasetDict:
    """Return the plain-text documents that nothing was trained on."""
    return _test_split([{"text": line} for line in HELD_OUT_TEXT.read_text(encoding="utf-8").splitlines()])


def _test_split(rows: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict(test=Dataset.from_list(rows))
