"""Architectures of today as their repositories describe them, in small: configuration, vocabulary, template, ids.

What matters for training is kept: layer types, grouped keys, head sizes, multipliers, control tokens, which tokens end
and pad a text. Windows are shorter than a row, so that they cut. Data only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_recipes.experiments.families.vocabularies import (
    COHERE_2,
    FALCON,
    GEMMA,
    GEMMA_4,
    GPT_NEOX,
    GPT_OSS,
    GRANITE,
    LFM_2,
    LLAMA_2,
    LLAMA_3,
    LLAMA_3_2,
    OLMO_2,
    PHI_3,
    QWEN_2_5,
    QWEN_3,
    SMOLLM_3,
    Vocabulary,
)


@dataclass(frozen=True)
class Architecture:
    """One repository on the hub, in small."""

    hub_id: str
    """The repository whose conventions it has."""
    trait: str
    """What it has that a plain Llama has not."""
    model_class: str
    config: Mapping[str, Any]
    """`config.json` without sizes that all share, and without token ids."""
    vocabulary: Vocabulary
    ends: tuple[str, ...]
    """`eos_token_id` of `generation_config.json`; the first is that of `config.json`."""
    template: str | None = None
    """TRL's copy of the chat template, or one of `templates/`; None for a base model."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes that differ from `SIZES`."""
    known: Mapping[str, str] = field(default_factory=dict)
    """What differs or is refused, to why this is right."""


SIZES = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048
)
_WINDOW = 32
_ALTERNATING = ["sliding_attention", "full_attention"]

ARCHITECTURES: dict[str, Architecture] = {
    "llama2": Architecture(
        "NousResearch/Llama-2-7b-chat-hf",
        "role markers in plain text, no pad token",
        "LlamaForCausalLM",
        dict(model_type="llama", num_key_value_heads=4, tie_word_embeddings=False, rms_norm_eps=1e-5),
        LLAMA_2,
        ends=("</s>",),
        template="llama2",
    ),
    "llama3": Architecture(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "grouped keys, two ends of text",
        "LlamaForCausalLM",
        dict(model_type="llama", num_key_value_heads=2, tie_word_embeddings=False, rope_theta=500000.0),
        LLAMA_3,
        ends=("<|eot_id|>", "<|end_of_text|>"),
        template="llama3",
    ),
    "llama3_2": Architecture(
        "meta-llama/Llama-3.2-1B-Instruct",
        "scaled rotary positions, tied embeddings, today's date in the template",
        "LlamaForCausalLM",
        dict(
            model_type="llama",
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            rope_theta=500000.0,
            rope_scaling=dict(
                rope_type="llama3",
                factor=32.0,
                high_freq_factor=4.0,
                low_freq_factor=1.0,
                original_max_position_embeddings=256,
            ),
        ),
        LLAMA_3_2,
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        template="llama3_2",
    ),
    "mistral": Architecture(
        "mistralai/Mistral-7B-Instruct-v0.1",
        "sliding window",
        "MistralForCausalLM",
        dict(model_type="mistral", num_key_value_heads=2, sliding_window=_WINDOW, tie_word_embeddings=False),
        LLAMA_2,
        ends=("</s>",),
        template="mistral",
    ),
    "mixtral": Architecture(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "experts",
        "MixtralForCausalLM",
        dict(
            model_type="mixtral",
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
        LLAMA_2,
        ends=("</s>",),
        template="mistral",
        sizes=dict(intermediate_size=128),
    ),
    "qwen2_5": Architecture(
        "Qwen/Qwen2.5-0.5B-Instruct",
        "biases of queries, keys and values; tied embeddings; ChatML",
        "Qwen2ForCausalLM",
        dict(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=False),
        QWEN_2_5,
        ends=("<|im_end|>", "<|endoftext|>"),
        template="qwen2_5",
    ),
    "qwen3": Architecture(
        "Qwen/Qwen3-8B",
        "norms of queries and keys, heads wider than hidden/heads, thinking",
        "Qwen3ForCausalLM",
        dict(model_type="qwen3", num_key_value_heads=2, head_dim=64, tie_word_embeddings=False),
        QWEN_3,
        ends=("<|im_end|>", "<|endoftext|>"),
        template="qwen3",
    ),
    "qwen3_moe": Architecture(
        "Qwen/Qwen3-30B-A3B",
        "experts",
        "Qwen3MoeForCausalLM",
        dict(
            model_type="qwen3_moe",
            num_key_value_heads=2,
            head_dim=64,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        ),
        QWEN_3,
        ends=("<|im_end|>", "<|endoftext|>"),
        template="qwen3",
    ),
    "gemma2": Architecture(
        "google/gemma-2-2b-it",
        "soft caps, every other layer with a window, four norms a block, end of turn that is not EOS",
        "Gemma2ForCausalLM",
        dict(
            model_type="gemma2",
            num_key_value_heads=2,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=_WINDOW,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            hidden_activation="gelu_pytorch_tanh",
        ),
        GEMMA,
        ends=("<eos>", "<end_of_turn>"),
        template="gemma",
    ),
    "gemma3": Architecture(
        "google/gemma-3-1b-it",
        "norms of queries and keys, windows with their own rotary positions",
        "Gemma3ForCausalLM",
        dict(
            model_type="gemma3_text",
            num_key_value_heads=1,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=_WINDOW,
            layer_types=_ALTERNATING,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            hidden_activation="gelu_pytorch_tanh",
        ),
        GEMMA,
        ends=("<eos>", "<end_of_turn>"),
        template="gemma3",
    ),
    "gemma4": Architecture(
        "google/gemma-4-E2B-it",
        "embeddings for each layer, layers that share keys and values, wider heads without a window",
        "Gemma4ForCausalLM",
        dict(
            model_type="gemma4_text",
            num_key_value_heads=1,
            head_dim=32,
            global_head_dim=64,
            sliding_window=_WINDOW,
            layer_types=_ALTERNATING * 2,
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=64,
            final_logit_softcapping=30.0,
            hidden_activation="gelu_pytorch_tanh",
            tie_word_embeddings=True,
        ),
        GEMMA_4,
        ends=("<eos>", "<turn|>"),
        template="gemma4_v5",
        sizes=dict(num_hidden_layers=4),
    ),
    "phi3": Architecture(
        "microsoft/Phi-3-mini-4k-instruct",
        "fused projections, pad token that is EOS",
        "Phi3ForCausalLM",
        dict(model_type="phi3", num_key_value_heads=4, sliding_window=_WINDOW, tie_word_embeddings=False),
        PHI_3,
        ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        template="phi3",
    ),
    "smollm3": Architecture(
        "HuggingFaceTB/SmolLM3-3B",
        "layers without positions, pad token that ends a turn, markers that hold the role",
        "SmolLM3ForCausalLM",
        dict(model_type="smollm3", num_key_value_heads=2, no_rope_layers=[1, 0], tie_word_embeddings=True),
        SMOLLM_3,
        ends=("<|im_end|>",),
        template="smollm3",
        known={"mask": "its own marks put the role's name into the loss, where it teaches nothing; here it is not"},
    ),
    "gpt_neox": Architecture(
        "EleutherAI/pythia-410m",
        "attention beside the MLP, biases, LayerNorm, no template",
        "GPTNeoXForCausalLM",
        dict(model_type="gpt_neox", rotary_pct=0.25, use_parallel_residual=True, tie_word_embeddings=False),
        GPT_NEOX,
        ends=("<|endoftext|>",),
        sizes=dict(intermediate_size=512),
    ),
    "falcon": Architecture(
        "tiiuae/falcon-7b",
        "linears of a class of their own, one key/value head, no template",
        "FalconForCausalLM",
        dict(
            model_type="falcon",
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            alibi=False,
            bias=False,
            tie_word_embeddings=True,
        ),
        FALCON,
        ends=("<|endoftext|>",),
    ),
    "olmo2": Architecture(
        "allenai/OLMo-2-1124-7B-Instruct",
        "norms after attention and MLP, role markers in plain text",
        "Olmo2ForCausalLM",
        dict(model_type="olmo2", num_key_value_heads=4, tie_word_embeddings=False),
        OLMO_2,
        ends=("<|endoftext|>",),
        template="olmo2",
    ),
    "granite": Architecture(
        "ibm-granite/granite-3.3-2b-instruct",
        "multipliers, one token for BOS, EOS and pad, today's date in the template",
        "GraniteForCausalLM",
        dict(
            model_type="granite",
            num_key_value_heads=2,
            embedding_multiplier=12.0,
            attention_multiplier=0.03125,
            residual_multiplier=0.22,
            logits_scaling=8.0,
            tie_word_embeddings=True,
        ),
        GRANITE,
        ends=("<|end_of_text|>",),
        template="granite",
    ),
    "gpt_oss": Architecture(
        "openai/gpt-oss-20b",
        "experts with biases, sinks, windows, channels",
        "GptOssForCausalLM",
        dict(
            model_type="gpt_oss",
            num_key_value_heads=2,
            head_dim=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=_WINDOW,
            layer_types=_ALTERNATING,
            rope_theta=150000,
            rope_scaling=dict(
                rope_type="yarn",
                factor=32.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=64,
            ),
            tie_word_embeddings=False,
        ),
        GPT_OSS,
        ends=("<|return|>", "<|endoftext|>", "<|call|>"),
        template="gptoss",
        sizes=dict(intermediate_size=128),
    ),
    "lfm2": Architecture(
        "LiquidAI/LFM2-1.2B",
        "short convolutions in most layers",
        "Lfm2ForCausalLM",
        dict(
            model_type="lfm2",
            num_key_value_heads=2,
            layer_types=["conv", "full_attention", "conv"],
            conv_L_cache=3,
            block_multiple_of=64,
            block_auto_adjust_ff_dim=True,
            tie_word_embeddings=True,
        ),
        LFM_2,
        ends=("<|im_end|>",),
        template="lfm2",
        sizes=dict(num_hidden_layers=3),
    ),
    "cohere2": Architecture(
        "CohereLabs/tiny-aya-earth",
        "attention beside the MLP, windows with positions and whole layers without, scaled logits",
        "Cohere2ForCausalLM",
        dict(
            model_type="cohere2",
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=_WINDOW,
            layer_types=_ALTERNATING,
            logit_scale=0.25,
            tie_word_embeddings=True,
        ),
        COHERE_2,
        ends=("<|END_OF_TURN_TOKEN|>",),
        template="cohere2",
    ),
}
"""Name to architecture."""
