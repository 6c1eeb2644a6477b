"""Bases with random weights in the shapes of a family: speed and memory do not depend on the weights' values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from qlora_recipes.errors import UsageError
from qlora_recipes.models import MODELS

SPECS = {spec.family: spec for spec in MODELS.values()}


def config_of(family: str, hidden_size: int, num_hidden_layers: int, vocab_size: int) -> PreTrainedConfig:
    """Return the configuration of a decoder of a family; everything else is in proportion to the 7B model.

    Raises:
        UsageError: for a width that is no multiple of the size of the family's attention heads.
    """
    whole = SPECS[family].sizes
    head = whole.hidden_size // whole.num_attention_heads
    if hidden_size % head or hidden_size <= 0:
        raise UsageError(f"--hidden_size {hidden_size}: expected a multiple of {head}, the size of {family}'s heads")
    heads = hidden_size // head
    sizes = replace(
        whole,
        hidden_size=hidden_size,
        num_key_value_heads=heads if whole.num_key_value_heads == whole.num_attention_heads else 1,
        intermediate_size=whole.intermediate_size * hidden_size // whole.hidden_size,
    )
    return AutoConfig.for_model(
        whole.family.model_types[0],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        **whole.family.config_from_sizes(sizes),
    )


def make(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a base of that shape with random bfloat16 weights, and the tokenizer, into a folder."""
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
