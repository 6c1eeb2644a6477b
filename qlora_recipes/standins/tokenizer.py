"""The stand-ins' tokenizers: small vocabularies of the same kind, with the same special tokens, as the real ones.

All hold every byte, so that any text can be encoded.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from qlora_recipes.standins.wordings import CHAT_ROLES, CHAT_WORDS, FORMAT_LINES

LLAMA_2_SPECIAL = ["<unk>", "<s>", "</s>"]
FALCON_SPECIAL = [
    *(f">>{name}<<" for name in "TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN".split()),
    *(f">>{name}<<" for name in "PREFIX SUFFIX MIDDLE".split()),
    "<|endoftext|>",
]


@dataclass(frozen=True)
class Special:
    """The special tokens of a model of today, at the front of a vocabulary that is the same for all of them."""

    bos: str | None
    """Begins every text; None for a model that has no such token."""
    eos: str
    """Ends a document of pretraining."""
    end_of_turn: str
    """What `eos_token` of the chat model's tokenizer names."""
    others: tuple[str, ...]
    pad: str | None = None
    plain: tuple[str, ...] = ()
    """Those of the others that are single tokens and yet text, which a tokenizer does not skip when it decodes."""

    @property
    def tokens(self) -> list[str]:
        """All of them, at the same ids in every family: begin, end, and the rest up to `SPECIAL` in number."""
        named = dict.fromkeys([self.bos or "<|reserved_0|>", self.eos, self.end_of_turn, *self.others])
        return [*named, *(f"<|reserved_{number}|>" for number in range(len(named), SPECIAL))]


SPECIAL = 16
THOUGHTS_AND_TOOLS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MODERN = {
    "llama3": Special(
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        end_of_turn="<|eot_id|>",
        others=(
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|python_tag|>",
            "<|finetune_right_pad_id|>",
        ),
    ),
    "qwen3": Special(
        bos=None,
        eos="<|endoftext|>",
        end_of_turn="<|im_end|>",
        others=("<|im_start|>", *THOUGHTS_AND_TOOLS),
        pad="<|endoftext|>",
        plain=THOUGHTS_AND_TOOLS,
    ),
    "smollm3": Special(
        bos=None,
        eos="<|end_of_text|>",
        end_of_turn="<|im_end|>",
        others=("<|im_start|>", *THOUGHTS_AND_TOOLS),
        pad="<|im_end|>",
        plain=THOUGHTS_AND_TOOLS,
    ),
    "gemma3": Special(
        bos="<bos>",
        eos="<eos>",
        end_of_turn="<end_of_turn>",
        others=("<start_of_turn>", "<pad>", "<unk>", "<mask>"),
        pad="<pad>",
    ),
    "mistral": Special(
        bos="<s>",
        eos="</s>",
        end_of_turn="</s>",
        others=(
            *("<unk>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    ),
    "gpt_oss": Special(
        bos="<|startoftext|>",
        eos="<|endoftext|>",
        end_of_turn="<|return|>",
        others=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|endofprompt|>"),
        pad="<|endoftext|>",
    ),
}
"""Family -> its special tokens under their real names."""


def train_modern(family: str, texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE that the models of today share here, with one family's special tokens and template."""
    special = MODERN[family]
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, normalized=False) for token in special.tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [" ".join(CHAT_ROLES), *CHAT_ROLES, *FORMAT_LINES]
    tokenizer.train_from_iterator([*texts, *words * 300], trainer)
    # From here on newlines are words of their own, as in the real vocabularies: one that ends a prompt is then the
    # same token as one with an answer after it.
    newlines = pre_tokenizers.Split(Regex("[\r\n]+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newlines, *split])
    if special.bos and family != "gpt_oss":  # whose own tokenizer adds none
        begin = [(special.bos, tokenizer.token_to_id(special.bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{special.bos} $A", special_tokens=begin)
    saved = json.loads(tokenizer.to_str())
    for token in saved["added_tokens"]:
        token["special"] = token["content"] not in special.plain
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)),
        bos_token=special.bos,
        eos_token=special.end_of_turn,
        pad_token=special.pad,
        clean_up_tokenization_spaces=False,
        chat_template=(Path(__file__).parent / family / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def train_llama2(texts: Iterable[str], size: int) -> LlamaTokenizer:
    """Train a BPE over characters, with one token for each byte to fall back on, as SentencePiece does."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # Words are split for training only: no token then spans two words or a full stop, as in the real vocabulary.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always", split=True), pre_tokenizers.Punctuation()]
    )
    alphabet = sorted(set(string.printable) - set(string.whitespace))
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=LLAMA_2_SPECIAL + bytes_, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_with_chat_words(texts), trainer)
    merges = [tuple(pair) for pair in _bpe(tokenizer)["merges"]]
    # legacy=True gives Meta's own ids with transformers 5: a space before every piece of text, not the first only.
    llama = LlamaTokenizer(vocab=_bpe(tokenizer)["vocab"], merges=merges, legacy=True)
    llama.init_kwargs["legacy"] = True  # without this line the choice is not saved
    return llama


def train_falcon(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Falcon's twelve special tokens, the last of which begins and ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, normalized=False) for token in FALCON_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_chat_words(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _with_chat_words(texts: Iterable[str]) -> Iterable[str]:
    yield from texts
    yield from [" ".join(CHAT_WORDS)] * 1000


def _bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model
