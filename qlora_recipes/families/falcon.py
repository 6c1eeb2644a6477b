"""Falcon-7B: one LayerNorm a block that attention and MLP both read, one fused attention product, an MLP of two.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_recipes.families.family import LAYER_NORM, Family, Linear, Sizes


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_key_value_heads": 1 if config.get("multi_query", True) else config["num_attention_heads"],
        "intermediate_size": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "tied_embeddings": config.get("tie_word_embeddings", True),
    }


def _config(sizes: Sizes) -> dict[str, Any]:
    return {
        "multi_query": sizes.num_key_value_heads == 1,
        "ffn_hidden_size": sizes.intermediate_size,
        "tie_word_embeddings": sizes.tied_embeddings,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": False,
    }


FALCON = Family(
    model_types=("falcon",),
    linears=(
        Linear("query_key_value", reads="norm", outputs="query_key_value_size"),
        Linear("dense", reads="attention"),
        Linear("dense_h_to_4h", reads="norm", outputs="intermediate_size"),
        Linear("dense_4h_to_h", reads="activation", inputs="intermediate_size"),
    ),
    norm=LAYER_NORM,
    norms=1,
    sizes_from_config=_sizes,
    config_from_sizes=_config,
    fused_qkv=True,
    mlp_kept=1,  # the input of GELU
    mlp_forward=4,
    mlp_workspace=(2, 4),
    heap=(0.25, 1.0),
    attention_repair="route_falcon_attention",
    # Falcon-40B has more norms, Falcon-RW has biases: both are counted.
    assumes={"new_decoder_architecture": False, "parallel_attn": True, "bias": False},
)
