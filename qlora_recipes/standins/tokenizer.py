"""The stand-ins' tokenizers: small vocabularies of the same kind, with the same special tokens, as the real ones.

Both hold every byte, so that any text can be encoded.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from qlora_recipes.standins.wordings import CHAT_WORDS

LLAMA_2_SPECIAL = ["<unk>", "<s>", "</s>"]
FALCON_SPECIAL = [
    *(f">>{name}<<" for name in "TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN".split()),
    *(f">>{name}<<" for name in "PREFIX SUFFIX MIDDLE".split()),
    "<|endoftext|>",
]


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
