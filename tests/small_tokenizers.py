"""Tokenizers in memory with any special tokens, for tests of templates and of what is found in a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def small_tokenizer(
    special: Sequence[str] = (), words: Sequence[str] = (), *, template: str | None = None, **named: str
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a token for each byte, special ones, words, and named ones (`eos_token=`)."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in dict.fromkeys([*special, *named.values()])]
    )
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = template
    return tokenizer
