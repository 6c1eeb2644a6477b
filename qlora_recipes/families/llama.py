"""Llama: two RMS norms a block, separate attention projections, an MLP of three matrices with a gate.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_recipes.families.family import RMS_NORM, Family, Linear, Sizes


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    return {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "intermediate_size": config["intermediate_size"],
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "head_dim": None if head_dim == hidden // heads else head_dim,
        "sliding_window": config.get("sliding_window"),
    }


def _config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_key_value_heads": sizes.num_key_value_heads,
        "intermediate_size": sizes.intermediate_size,
        "tie_word_embeddings": sizes.tied_embeddings,
        "rms_norm_eps": 1e-5,
    }


LLAMA = Family(
    model_types=("llama",),
    linears=(
        Linear("q_proj", reads="first norm", outputs="query_size"),
        Linear("k_proj", reads="first norm", outputs="key_value_size"),
        Linear("v_proj", reads="first norm", outputs="key_value_size"),
        Linear("o_proj", reads="attention", inputs="query_size"),
        Linear("gate_proj", reads="second norm", outputs="intermediate_size"),
        Linear("up_proj", reads="second norm", outputs="intermediate_size"),
        Linear("down_proj", reads="gated", inputs="intermediate_size"),
    ),
    norm=RMS_NORM,
    norms=2,
    sizes_from_config=_sizes,
    config_from_sizes=_config,
    fused_qkv=False,
    mlp_kept=2,  # gate and up (`elementwise.py`)
    mlp_forward=5,
    mlp_workspace=(4, 6),
    heap=(0.4, 2.25),
    assumes={"attention_bias": False, "mlp_bias": False},
)
MISTRAL = replace(LLAMA, model_types=("mistral",))  # the same blocks
