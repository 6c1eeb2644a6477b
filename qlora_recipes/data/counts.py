"""What the checks need to know of every row, counted in one pass over them. Knows nothing of verdicts.

Some figures are kept per row, as numpy arrays of a few bytes each; the rows themselves are not kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TypeVar

import numpy

from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.data.encoding import ConversationEncoder

_SHARED_WORDS = 8  # consecutive words that two texts almost never share by chance
_HELD_OUT = 2_000  # held-out conversations to look for, since hashes of all their words are in memory
_NO_TOKEN = -1
Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int, where: numpy.ndarray | None = None) -> list[Item]:
    """Return at most `count` items at even distances, the first and the last included; nothing random.

    With `where`, a bool for each item, only those for which it is true are chosen from.
    """
    places = numpy.arange(len(items)) if where is None else numpy.flatnonzero(where)
    if len(places) > count:
        places = places[[round(i * (len(places) - 1) / (count - 1)) for i in range(count)]]
    return [items[int(place)] for place in places]


@dataclass
class Faulty:
    """How many rows have a fault, and the place of the first of them."""

    count: int = 0
    first: str = ""

    def add(self, place: str) -> None:
        """Count a row."""
        self.count += 1
        self.first = self.first or place


@dataclass
class RowCounts:
    """Figures of the training rows, or of all rows where the field says so."""

    lengths: numpy.ndarray
    """Tokens in each row."""
    whole: numpy.ndarray
    """Whether each row was kept whole, not truncated."""
    held_out_whole: numpy.ndarray
    """The same for each held-out row."""
    plain: numpy.ndarray
    """Whether each row's text is free of control tokens."""
    duplicates: int = 0
    """Rows with the words of an earlier row."""
    answers: int = 0
    wordless_answers: int = 0
    one_word_answers: int = 0
    known_held_out: int = 0
    """Held-out conversations, of those looked for, that mostly occur in the training rows."""
    searched_held_out: int = 0
    """Held-out conversations looked for."""
    without_loss: int = 0
    """Rows without a supervised token."""
    without_end: Faulty = field(default_factory=Faulty)
    """Rows kept whole in which some answer does not train the token that ends it."""
    doubled_bos: int = 0
    """Rows with two BOS tokens in succession."""
    without_bos: int = 0
    """Rows that do not start with BOS."""
    with_padding: Faulty = field(default_factory=Faulty)
    """Rows that contain the padding token."""
    unknown_tokens: int = 0
    other_controls: Faulty = field(default_factory=Faulty)
    """Rows, held-out ones too, with other control tokens than their roles require."""
    largest_id: int = 0
    """Over all rows, held-out ones too."""

    @property
    def shortest(self) -> list[int]:
        """Indices of the two shortest training rows."""
        return [int(i) for i in numpy.argsort(self.lengths, kind="stable")[:2]]


def count_rows(
    train: Sequence[Conversation], held_out: Sequence[Conversation], encoder: ConversationEncoder
) -> RowCounts:
    """Go through the rows once and return what they add up to."""
    counts = RowCounts(
        lengths=numpy.zeros(len(train), numpy.int32),
        whole=numpy.zeros(len(train), bool),
        held_out_whole=numpy.zeros(len(held_out), bool),
        plain=numpy.zeros(len(train), bool),
    )
    texts, tokens = _Texts(counts, encoder, held_out), _Tokens(counts, encoder)
    for i, row in enumerate(train):
        texts.add(i, row)
        tokens.add(i, row)
        tokens.add_controls(row)
    for i, row in enumerate(held_out):
        tokens.add_controls(row)
        counts.held_out_whole[i] = not row.truncated
    texts.finish()
    return counts


class _Texts:
    """Counts what is said: copies, short answers, written control tokens, held-out text that training contains."""

    def __init__(self, counts: RowCounts, encoder: ConversationEncoder, held_out: Sequence[Conversation]) -> None:
        self._counts = counts
        self._special_tokens = encoder.tokenizer.all_special_tokens
        self._hashes = numpy.zeros(len(counts.lengths), numpy.int64)
        self._held_out = [set(_shingles(_words(row))) for row in spread(held_out, _HELD_OUT)]
        self._expected: set[int] = set().union(*self._held_out)
        self._seen: set[int] = set()

    def add(self, i: int, row: Conversation) -> None:
        counts, words = self._counts, _words(row)
        self._hashes[i] = hash(tuple(words))
        self._seen |= self._expected.intersection(_shingles(words))
        for message, said in zip(row.messages, words, strict=True):
            if message["role"] == "assistant":
                counts.answers += 1
                counts.wordless_answers += not said
                counts.one_word_answers += len(message["content"].split(maxsplit=1)) == 1
        counts.plain[i] = not any(
            token in message["content"] for message in row.messages for token in self._special_tokens
        )

    def finish(self) -> None:
        counts, looked_for = self._counts, self._held_out
        counts.duplicates = len(self._hashes) - len(numpy.unique(self._hashes))
        counts.searched_held_out = len(looked_for)
        counts.known_held_out = sum(bool(parts) and len(parts & self._seen) > len(parts) / 2 for parts in looked_for)


def _words(row: Conversation) -> list[tuple[str, ...]]:
    """Return the words of each message, in lower case."""
    return [tuple(re.findall(r"\w+", message["content"].lower())) for message in row.messages]


def _shingles(messages: Sequence[tuple[str, ...]]) -> Iterator[int]:
    """Yield a hash of every eight consecutive words of each message, or of a shorter message as a whole."""
    for i, said in enumerate(messages):
        # a short answer is recognized only together with its question
        words = messages[i - 1] + said if i and len(said) < _SHARED_WORDS else said
        for start in range(max(1, len(words) - _SHARED_WORDS + 1)):
            yield hash(words[start : start + _SHARED_WORDS])


class _Tokens:
    """Counts what rows are as ids and labels."""

    def __init__(self, counts: RowCounts, encoder: ConversationEncoder) -> None:
        tokenizer = encoder.tokenizer
        self._counts = counts
        self._controls = encoder.control_tokens
        self._structure = cache(encoder.structure)
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        self._bos, self._end, self._pad, self._unknown = (_NO_TOKEN if token is None else token for token in ids)

    def add(self, i: int, row: Conversation) -> None:
        counts, ids, labels = self._counts, row.encoded.input_ids, row.encoded.labels
        counts.lengths[i] = len(ids)
        counts.whole[i] = not row.truncated
        counts.without_loss += not row.encoded.supervised
        counts.doubled_bos += ids.count(self._bos) > 1 and (self._bos, self._bos) in pairwise(ids)
        counts.without_bos += ids[0] != self._bos
        counts.unknown_tokens += ids.count(self._unknown)
        answers = sum(message["role"] == "assistant" for message in row.messages)
        if not row.truncated and (labels.count(self._end) != answers or labels[-1] != self._end):
            counts.without_end.add(row.place)
        if self._pad in ids:
            counts.with_padding.add(row.place)

    def add_controls(self, row: Conversation) -> None:
        got = self._controls(row.encoded.input_ids)
        expected = self._structure(tuple(message["role"] for message in row.messages))
        if not (got <= expected if row.truncated else got == expected):
            self._counts.other_controls.add(row.place)
        self._counts.largest_id = max(self._counts.largest_id, *row.encoded.input_ids)
