"""Counts the tokens of the batches that a process runs through the model. Knows nothing of trainers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_recipes.data.encoding import IGNORED


@dataclass
class TokenCount:
    """What this process has run through the model."""

    positions: int = 0
    real: int = 0
    supervised: int = 0
    micro_batches: int = 0

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count a batch; what was counted stays on its device until `read`, because asking a GPU is waiting for it."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.micro_batches += 1
        self.positions += ids.numel()
        self.real += ids.numel() if mask is None else mask.sum()
        mask = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"] != IGNORED
        self.supervised += mask.sum()

    def read(self) -> TokenCount:
        """Return the counts as numbers."""
        return TokenCount(**{name: int(count) for name, count in vars(self).items()})
