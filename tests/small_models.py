"""Small random models of other architectures than the stand-ins', with the stand-in's tokenizer.

Sizes are multiples of 64, which is a block of 4-bit weights; each has what its architecture is known for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_recipes.standins import STANDINS

VOCABULARY = 4096  # at least that of the stand-in's tokenizer
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
_LOCAL_AND_GLOBAL = dict(sliding_window=128, layer_types=["sliding_attention", "full_attention"])
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "cohere": dict(logit_scale=0.25),
    "gemma2": dict(head_dim=32, query_pre_attn_scalar=16, final_logit_softcapping=5.0, **_LOCAL_AND_GLOBAL),
    "gemma3_text": dict(head_dim=32, **_LOCAL_AND_GLOBAL),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_positions=2048),
    "gpt_neox": {},
    "gpt_oss": dict(_EXPERTS, head_dim=32, **_LOCAL_AND_GLOBAL),
    "granite": dict(logits_scaling=4.0, attention_multiplier=0.1, residual_multiplier=0.5),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "mamba": dict(state_size=8),
    "mistral": dict(sliding_window=128, head_dim=32),
    "mixtral": dict(_EXPERTS, sliding_window=128),
    "olmoe": _EXPERTS,
    "phi": {},
    "phi3": {},
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3_moe": dict(_EXPERTS, head_dim=32),
}
"""`model_type` -> fields of its configuration beyond the sizes of all."""


def make_small(model_type: str, folder: Path) -> Path:
    """Save a random model of an architecture, with biases and sinks that are not zero."""
    config = AutoConfig.for_model(model_type, **{**_SIZES, **ARCHITECTURES[model_type]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            weight.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STANDINS["llama2"].folder, legacy=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of the small model of an architecture, made once."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = make_small(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return make
