"""The untrained models of the stand-ins: the real architecture classes at a few million parameters or fewer.

Knows nothing of texts or training.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

CONTEXT = 2048


def build_llama2(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Build an untrained model of Llama-2's architecture."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # PreTrainedConfig takes it among its **kwargs
        )
    )


def build_falcon(tokenizer: PreTrainedTokenizerBase) -> FalconForCausalLM:
    """Build an untrained model of Falcon-7b's architecture: one key and value head, attention beside the MLP."""
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            alibi=False,
            bias=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            max_position_embeddings=CONTEXT,
            bos_token_id=11,
            eos_token_id=11,
            tie_word_embeddings=True,
        )
    )


def build_llama3(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Build an untrained model of Llama 3.1's architecture: grouped keys, positions scaled for a long context."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaForCausalLM(
        LlamaConfig(**_modern(tokenizer), max_position_embeddings=131_072, rope_parameters=scaling, rms_norm_eps=1e-5)
    )


def build_mistral(tokenizer: PreTrainedTokenizerBase) -> MistralForCausalLM:
    """Build an untrained model of Mistral-7B-v0.3's architecture: grouped keys, no window."""
    positions = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return MistralForCausalLM(
        MistralConfig(
            **_modern(tokenizer),
            max_position_embeddings=32_768,
            rope_parameters=positions,
            rms_norm_eps=1e-5,
            sliding_window=None,
        )
    )


def build_qwen3(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Build an untrained model of Qwen3-8B's architecture: queries and keys normalized, head_dim not hidden/heads."""
    positions = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return Qwen3ForCausalLM(
        Qwen3Config(**_modern(tokenizer), max_position_embeddings=40_960, rope_parameters=positions, rms_norm_eps=1e-6)
    )


def build_smollm3(tokenizer: PreTrainedTokenizerBase) -> SmolLM3ForCausalLM:
    """Build an untrained model of SmolLM3-3B's architecture: every fourth layer without positions."""
    positions = {"rope_type": "default", "rope_theta": 5_000_000.0}
    return SmolLM3ForCausalLM(
        SmolLM3Config(
            **_modern(tokenizer), max_position_embeddings=65_536, rope_parameters=positions, no_rope_layer_interval=4
        )
    )


def build_gemma3(tokenizer: PreTrainedTokenizerBase) -> Gemma3ForCausalLM:
    """Build an untrained model of Gemma 3's text architecture: windows in all layers but one, four norms a layer."""
    sizes = _modern(tokenizer)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **sizes,
            max_position_embeddings=32_768,
            query_pre_attn_scalar=sizes["head_dim"],
            sliding_window=512,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
        )
    )


def build_gpt_oss(tokenizer: PreTrainedTokenizerBase) -> GptOssForCausalLM:
    """Build an untrained model of gpt-oss's architecture: four experts in every layer, two of them for each token."""
    return GptOssForCausalLM(
        GptOssConfig(
            **_modern(tokenizer),
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"] * 2,
            max_position_embeddings=131_072,
        )
    )


def _modern(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the sizes that the models of today share here."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": False,  # where the real one ties them (SmolLM3, Gemma) too: the trunk does not
        "attn_implementation": "eager",  # for 128 tokens at a time, a fifth less time a step on a CPU than sdpa
    }
