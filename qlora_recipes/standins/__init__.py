"""Small pretrained models and data that take every recipe through the real code on a laptop, without a network.

Knows paths and settings only; what made the files is in `make.py`, and what they may be used for in the README.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

HERE = Path(__file__).parent


@dataclass(frozen=True)
class StandIn:
    """A small pretrained model of a family's architecture, with the settings that suit its size."""

    family: str
    """Its name, and that of its folder."""

    folder: Path
    """Model and tokenizer, as `from_pretrained` reads them."""

    training: Mapping[str, object]
    """`SFTConfig` fields, as calibrated; they stand in for those that a recipe sets for a model of 7B."""

    lora: Mapping[str, object]
    """`LoraConfig` fields likewise, all but the target modules, which are the family's."""


TRAINING = MappingProxyType(
    {
        "learning_rate": 3e-3,  # higher learns the format sooner and forgets facts sooner
        "max_steps": 150,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "max_length": 256,  # the longest bundled row is shorter
        "packing": False,
        "gradient_checkpointing": False,  # saves memory that a model of this size does not need
    }
)
LORA = MappingProxyType({"r": 8, "lora_alpha": 16, "lora_dropout": 0.0})

PREFERENCES = MappingProxyType({"learning_rate": 1e-3, "max_steps": 60, "warmup_steps": 6})
"""What replaces some of TRAINING where preferences are learned."""
MODERN_TRAINING = MappingProxyType({**TRAINING, "max_length": 512})  # their templates write more around a conversation

STANDINS: dict[str, StandIn] = {
    **{family: StandIn(family, HERE / family, training=TRAINING, lora=LORA) for family in ("llama2", "falcon")},
    **{
        family: StandIn(family, HERE / family, training=MODERN_TRAINING, lora=LORA)
        for family in ("llama3", "qwen3", "smollm3", "mistral", "gemma3", "gpt_oss")
    },
}
"""Family -> stand-in."""

ROWS: dict[str, Path] = {
    "guanaco_llama2": HERE / "data" / "guanaco_llama2.jsonl",
    "openassistant_guanaco": HERE / "data" / "openassistant_guanaco.jsonl",
    "faq": HERE / "data" / "faq.json",
    "preferences": HERE / "data" / "preferences.jsonl",
    "chat": HERE / "data" / "chat.jsonl",
    "reasoning": HERE / "data" / "reasoning.jsonl",
    "tools": HERE / "data" / "tools.jsonl",
}
"""Shape of a dataset -> bundled rows of that shape about the stand-ins' world."""

QUESTIONS = HERE / "data" / "questions.jsonl"
"""Held-out multiple-choice questions: subject, question, choices, answer (an index), text (the right choice)."""

HELD_OUT_TEXT = HERE / "data" / "held_out.txt"
"""Plain text of the same world, one document a line, that was not trained on: for bits per byte."""
