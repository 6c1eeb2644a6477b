"""Bases with random weights in the shapes of a family: speed and memory do not depend on what the weights are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import FalconConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

from qlora_recipes.errors import UsageError
from qlora_recipes.models import MODELS, ModelSpec

SPECS: dict[str, ModelSpec] = {spec.family: spec for spec in MODELS.values()}
_HEAD = {"llama2": 128, "falcon": 64}
"""Size of an attention head in Llama-2-7B and Falcon-7B."""


@dataclass(frozen=True)
class Shape:
    """A decoder of a family; all else follows as in the 7B model."""

    family: str
    hidden: int
    layers: int
    vocab_size: int

    def config(self) -> PreTrainedConfig:
        """Return the configuration.

        Raises:
            UsageError: for a width that is no multiple of the family's attention heads.
        """
        head = _HEAD[self.family]
        if self.hidden % head or self.hidden <= 0:
            raise UsageError(
                f"--hidden_size {self.hidden}: expected a multiple of {head}, the size of {self.family}'s heads"
            )
        common: dict[str, Any] = dict(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // head,
            max_position_embeddings=4096,
        )
        if self.family == "falcon":
            return FalconConfig(
                **common, multi_query=True, parallel_attn=True, new_decoder_architecture=False, bias=False
            )
        inner = SPECS["llama2"].sizes.intermediate_size * self.hidden // SPECS["llama2"].sizes.hidden_size
        return LlamaConfig(**common, intermediate_size=inner, tie_word_embeddings=False, rms_norm_eps=1e-5)


def make(shape: Shape, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a base of that shape with random bfloat16 weights, and the tokenizer, into a folder."""
    from transformers import AutoModelForCausalLM

    config = shape.config()
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
