"""The control tokens of real tokenizers, in the order of their ids, and how each tokenizer cuts words. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer: how it cuts words, and its control tokens."""

    kind: str
    """`bytes` (byte-level BPE), `pieces` (SentencePiece's, a space before the text) or `pieces-bare` (without one)."""
    tokenizer_class: str
    """As `tokenizer_config.json` names it."""
    first: tuple[str, ...] = ()
    """Control tokens before the words."""
    last: tuple[str, ...] = ()
    """Control tokens after them."""
    plain: tuple[str, ...] = ()
    """Those of both that are added tokens but not special, such as <think>."""
    swallows: tuple[str, ...] = ()
    """Those that take the white space after them with them."""
    bos: str | None = None
    eos: str = ""
    pad: str | None = None
    unk: str | None = None
    adds_bos: bool = False
    """Whether encoding a text puts BOS before it."""


LLAMA_2 = Vocabulary(
    "pieces", "LlamaTokenizer", ("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>", unk="<unk>", adds_bos=True
)
LLAMA_3 = Vocabulary(
    "bytes",
    "PreTrainedTokenizerFast",
    last=(
        *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        *("<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>"),
    ),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    adds_bos=True,
)
LLAMA_3_2 = Vocabulary(
    "bytes",
    "PreTrainedTokenizerFast",
    last=(
        *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>"),
    ),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    adds_bos=True,
)
_QWEN_2_5_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
)
QWEN_2_5 = Vocabulary(
    "bytes",
    "Qwen2Tokenizer",
    last=_QWEN_2_5_TOKENS,
    plain=_QWEN_2_5_TOKENS[12:],
    eos="<|im_end|>",
    pad="<|endoftext|>",
)
_QWEN_3_TOKENS = (*_QWEN_2_5_TOKENS, "<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN_3 = Vocabulary(
    "bytes", "Qwen2Tokenizer", last=_QWEN_3_TOKENS, plain=_QWEN_3_TOKENS[12:], eos="<|im_end|>", pad="<|endoftext|>"
)
GEMMA = Vocabulary(
    "pieces-bare",
    "GemmaTokenizer",
    (
        *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused1>", "<unused2>"),
        *("<start_of_turn>", "<end_of_turn>"),
    ),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    unk="<unk>",
    adds_bos=True,
)
GEMMA_4 = Vocabulary(
    "pieces-bare",
    "GemmaTokenizer",
    (
        *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", "<unused1>", "<unused2>", "<|turn>", "<turn|>"),
        *("<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
        *("<|tool_response>", "<tool_response|>", '<|"|>', "<|image|>", "<|audio|>", "<|video|>"),
    ),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    unk="<unk>",
    adds_bos=True,
)
PHI_3 = Vocabulary(
    "pieces",
    "LlamaTokenizer",
    ("<unk>", "<s>", "</s>"),
    (
        *("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>"),
        *("<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
    ),
    bos="<s>",
    eos="<|endoftext|>",
    pad="<|endoftext|>",
    unk="<unk>",
    swallows=("<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
)
SMOLLM_3 = Vocabulary(
    "bytes",
    "PreTrainedTokenizerFast",
    last=(
        *("<|begin_of_text|>", "<|end_of_text|>", "<think>", "</think>", "<|finetune_right_pad_id|>"),
        *("<|reserved_special_token_0|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        *("<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>"),
    ),
    plain=("<think>", "</think>", "<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>"),
    eos="<|im_end|>",
    pad="<|im_end|>",
)
_FALCON_TOKENS = (
    *(f">>{name}<<" for name in "TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN".split()),
    *(">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<", "<|endoftext|>"),
)
_GPT_OSS_TOKENS = (
    *("<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|reserved_200001|>", "<|return|>", "<|constrain|>"),
    *("<|reserved_200004|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|reserved_200009|>", "<|call|>"),
    "<|endofprompt|>",
)
_LFM_2_TOKENS = (
    *("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>"),
    *("<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    *("<|tool_response_start|>", "<|tool_response_end|>", "<|reserved_4|>", "<|reserved_5|>"),
)
COHERE_2 = Vocabulary(
    "bytes",
    "CohereTokenizer",
    ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>"),
    (
        *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|YES_TOKEN|>", "<|NO_TOKEN|>", "<|USER_TOKEN|>"),
        *("<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
    pad="<PAD>",
    unk="<UNK>",
    adds_bos=True,
)


GPT_NEOX = Vocabulary(
    "bytes",
    "GPTNeoXTokenizer",
    ("<|endoftext|>", "<|padding|>"),
    bos="<|endoftext|>",
    eos="<|endoftext|>",
    unk="<|endoftext|>",
)

FALCON = Vocabulary("bytes", "PreTrainedTokenizerFast", _FALCON_TOKENS, bos="<|endoftext|>", eos="<|endoftext|>")

OLMO_2 = Vocabulary(
    "bytes",
    "GPT2Tokenizer",
    last=("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|pad|>"),
    bos="<|endoftext|>",
    eos="<|endoftext|>",
    pad="<|pad|>",
    unk="<|endoftext|>",
)

GRANITE = Vocabulary(
    "bytes",
    "GPT2Tokenizer",
    ("<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
    ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    bos="<|end_of_text|>",
    eos="<|end_of_text|>",
    pad="<|end_of_text|>",
    unk="<|end_of_text|>",
)

GPT_OSS = Vocabulary(
    "bytes",
    "PreTrainedTokenizerFast",
    last=_GPT_OSS_TOKENS,
    bos="<|startoftext|>",
    eos="<|return|>",
    pad="<|endoftext|>",
)

LFM_2 = Vocabulary(
    "bytes",
    "PreTrainedTokenizerFast",
    _LFM_2_TOKENS,
    bos="<|startoftext|>",
    eos="<|im_end|>",
    pad="<|pad|>",
    adds_bos=True,
)
