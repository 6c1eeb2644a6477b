"""From plain text to tokens, in which nothing that it spells is a special one. Knows nothing of templates."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, cast

from tokenizers import Encoding
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerBase


def encodings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Encoding]:
    """Yield the tokens of plain texts, in which nothing is a special token."""
    backend: Any = tokenizer.backend_tokenizer
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    if backend.truncation or backend.padding:
        backend.no_truncation(), backend.no_padding()
    return iter(backend.encode_batch(texts, add_special_tokens=False) if texts else ())


def first_from(tokens: Encoding, character: int) -> int:
    """Return the first of the tokens that begins at a character of their text or after it."""
    if character <= 0:
        return 0
    return bisect_left(
        range(len(tokens)), character, key=lambda token: cast("tuple[int, int]", tokens.token_to_chars(token))[0]
    )


def inside_a_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer for text after a control token, before which some put no space as they do at the start."""
    before: Any = tokenizer.backend_tokenizer.pre_tokenizer if tokenizer.is_fast else None
    if getattr(before, "prepend_scheme", None) != "first":
        return tokenizer
    inside: Any = copy.deepcopy(tokenizer)
    inside.backend_tokenizer.pre_tokenizer = Metaspace(before.replacement, prepend_scheme="never", split=before.split)
    return cast("PreTrainedTokenizerBase", inside)
