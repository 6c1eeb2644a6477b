"""What `config.json` of published models says of their dimensions, and how many weights each has."""

from __future__ import annotations

from typing import Any

_GEMMA = {"model_type": "gemma3_text", "tie_word_embeddings": True, "head_dim": 256, "sliding_window": 1024}

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B": (
        dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False),
        8_030_261_248,
    ),
    "Qwen3-8B": (
        dict(model_type="qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32,
             num_key_value_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151936,
             tie_word_embeddings=False, sliding_window=None, use_sliding_window=False),
        8_190_735_360,
    ),
    "Qwen2.5-0.5B": (
        dict(model_type="qwen2", hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
             num_key_value_heads=2, intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen3-30B-A3B": (
        dict(model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
             num_key_value_heads=4, head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
             num_experts_per_tok=8, vocab_size=151936, tie_word_embeddings=False, mlp_only_layers=[],
             decoder_sparse_step=1),
        30_532_122_624,
    ),
    "Mixtral-8x7B": (
        dict(model_type="mixtral", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=8, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2,
             vocab_size=32000, tie_word_embeddings=False),
        46_702_792_704,
    ),
    "gpt-oss-20b": (
        dict(model_type="gpt_oss", hidden_size=2880, num_hidden_layers=24, num_attention_heads=64,
             num_key_value_heads=8, head_dim=64, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4,
             vocab_size=201088, sliding_window=128, tie_word_embeddings=False),
        20_914_757_184,
    ),
    "gemma-2-2b": (
        dict(model_type="gemma2", hidden_size=2304, num_hidden_layers=26, num_attention_heads=8,
             num_key_value_heads=4, head_dim=256, intermediate_size=9216, vocab_size=256000, sliding_window=4096),
        2_614_341_888,
    ),
    "gemma-3-1b": (
        dict(**_GEMMA, hidden_size=1152, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
             intermediate_size=6912, vocab_size=262144) | {"sliding_window": 512},
        999_885_952,
    ),
    "gemma-3-4b, its text": (
        dict(**_GEMMA, hidden_size=2560, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4,
             intermediate_size=10240, vocab_size=262208),
        3_880_263_168,
    ),
    "Phi-3-mini-4k": (
        dict(model_type="phi3", hidden_size=3072, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=32, intermediate_size=8192, vocab_size=32064, sliding_window=2047,
             tie_word_embeddings=False),
        3_821_079_552,
    ),
    "SmolLM3-3B": (
        dict(model_type="smollm3", hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
             num_key_value_heads=4, intermediate_size=11008, vocab_size=128256),
        3_075_098_624,
    ),
    "OLMo-2-7B": (
        dict(model_type="olmo2", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=32, intermediate_size=11008, vocab_size=100352, tie_word_embeddings=False),
        7_298_617_344,
    ),
    "Mistral-7B-v0.3": (
        dict(model_type="mistral", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=8, intermediate_size=14336, vocab_size=32768, tie_word_embeddings=False,
             sliding_window=None),
        7_248_023_552,
    ),
    "Mistral-Nemo": (
        dict(model_type="mistral", hidden_size=5120, num_hidden_layers=40, num_attention_heads=32,
             num_key_value_heads=8, head_dim=128, intermediate_size=14336, vocab_size=131072,
             tie_word_embeddings=False, sliding_window=None),
        12_247_782_400,
    ),
    "granite-3.3-8b": (
        dict(model_type="granite", hidden_size=4096, num_hidden_layers=40, num_attention_heads=32,
             num_key_value_heads=8, intermediate_size=12800, vocab_size=49159, tie_word_embeddings=True),
        8_170_864_640,
    ),
    "gpt-neox-20b": (
        dict(model_type="gpt_neox", hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
             intermediate_size=24576, vocab_size=50432, tie_word_embeddings=False),
        20_554_567_680,
    ),
    "LFM2-1.2B": (
        dict(model_type="lfm2", hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
             num_key_value_heads=8, intermediate_size=12288, block_auto_adjust_ff_dim=True, vocab_size=65536,
             layer_types=["conv", "conv", "full_attention", "conv", "conv", "full_attention", "conv", "conv",
                          "full_attention", "conv", "full_attention", "conv", "full_attention", "conv",
                          "full_attention", "conv"]),
        1_170_340_608,
    ),
    "falcon-40b": (
        dict(model_type="falcon", hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, num_kv_heads=8,
             new_decoder_architecture=True, bias=False, parallel_attn=True, vocab_size=65024),
        41_303_293_952,
    ),
}  # fmt: skip
