"""From plain text to tokens, in which nothing that it spells is a special one. Knows nothing of templates."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

from tokenizers import Encoding
from tokenizers.decoders import ByteLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
_PROBE = "Two  words, 12\n\n 'é' b"


class PlainEncoder:
    """Encodes plain texts with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each text, in which nothing is a special token; many are spread over the cores."""
        if not texts:
            return []
        backend = self._backend()
        if self._spelling is None:
            encoded = backend.encode_batch(texts, add_special_tokens=False)
            return [Tokens(text, found.ids, None, self, found) for text, found in zip(texts, encoded, strict=True)]
        # without offsets in two thirds of the time
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [Tokens(text, found.ids, self._spelling, self) for text, found in zip(texts, encoded, strict=True)]

    def with_offsets(self, text: str) -> Encoding:
        """Return the tokens of one text with their offsets."""
        return cast(Encoding, self._backend().encode(text, add_special_tokens=False))

    def _backend(self) -> Any:
        backend: Any = self._tokenizer.backend_tokenizer
        if not backend.encode_special_tokens:
            backend.encode_special_tokens = True
        if backend.truncation or backend.padding:
            backend.no_truncation(), backend.no_padding()
        return backend

    @cached_property
    def _spelling(self) -> Spelling | None:
        """What each token spells; None where that is not where its offset says that it begins.

        A tokenizer may change what it reads, or leave the space before a word out of its offset.
        """
        offsets = self.with_offsets(_PROBE)
        spelling = Spelling(self._backend())
        tokens = Tokens(_PROBE, offsets.ids, spelling, self, offsets)
        same = (tokens.spelled_until(i) == _first_from(offsets, i) for i in range(1, len(_PROBE)))
        return spelling if all(same) else None


class Spelling(dict[int, bytes]):
    """What each token of a vocabulary spells in UTF-8, found when it is first asked for."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._piece, self._of_bytes = backend.id_to_token, isinstance(backend.decoder, ByteLevel)

    def __missing__(self, token: int) -> bytes:
        piece = str(self._piece(token))
        if self._of_bytes and _BYTES.keys() >= set(piece):
            spelled = b"".join(_BYTES[character] for character in piece)
        elif len(piece) == 6 and piece.startswith("<0x"):
            spelled = bytes.fromhex(piece[3:5])
        else:
            spelled = piece.replace("▁", " ").encode()
        self[token] = spelled
        return spelled


class Tokens:
    """The tokens of a plain text."""

    def __init__(
        self,
        text: str,
        ids: list[int],
        spelling: Spelling | None,
        encoder: PlainEncoder,
        offsets: Encoding | None = None,
    ) -> None:
        self.ids = ids
        self._text, self._spelling, self._encoder, self._offsets = text, spelling, encoder, offsets

    def first_from(self, character: int) -> int:
        """Return the first of the tokens that begins at a character of the text or after it."""
        if character <= 0:
            return 0
        if character >= len(self._text):
            return len(self.ids)
        if (found := self.spelled_until(character)) is not None:
            return found
        return _first_from(self._offsets or self._encoder.with_offsets(self._text), character)

    def spelled_until(self, character: int) -> int | None:
        """Return how many tokens spell the text up to a character; None unless they do so byte by byte."""
        if self._spelling is None:
            return None
        until, size, parts = len(self._text[:character].encode()), 0, []
        for token in self.ids:
            if size > until:
                break
            parts.append(self._spelling[token])
            size += len(parts[-1])
        spelled, text = b"".join(parts), self._text[:size].encode()
        # some put a space before the first word; before spaces it cannot be told from them
        added = [space for space in (b"", b" ") if spelled == (space + text)[:size]]
        if len(added) != 1:
            return None
        return bisect_left(list(accumulate(map(len, parts), initial=-len(added[0]))), until)


def _first_from(offsets: Encoding, character: int) -> int:
    if character <= 0:
        return 0
    return bisect_left(
        range(len(offsets)), character, key=lambda token: cast("tuple[int, int]", offsets.token_to_chars(token))[0]
    )


def inside_a_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer for text after a control token, before which some put no space as they do at the start."""
    before: Any = tokenizer.backend_tokenizer.pre_tokenizer if tokenizer.is_fast else None
    if getattr(before, "prepend_scheme", None) != "first":
        return tokenizer
    inside: Any = copy.deepcopy(tokenizer)
    inside.backend_tokenizer.pre_tokenizer = Metaspace(before.replacement, prepend_scheme="never", split=before.split)
    return cast("PreTrainedTokenizerBase", inside)
