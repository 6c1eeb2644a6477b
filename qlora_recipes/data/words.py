"""Words of conversations as numbers: which of them say the same, and which share a passage. Knows nothing of rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy

from qlora_recipes.data.ragged import Ragged

_SHARED = 8  # consecutive words that two texts almost never share by chance
_BASE = numpy.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers stay odd
_POWERS = numpy.power(_BASE, numpy.arange(_SHARED, dtype=numpy.uint64))
_OF_NONE, _OF_WORDS = 1, 2
_KINDS = numpy.zeros(0x110000, numpy.uint8)  # of all characters; 0 for those that were in no text yet


class WordHashes(NamedTuple):
    """What the words of a few conversations are."""

    whole: numpy.ndarray
    """One hash for each conversation, of all its words and of which message each is in."""
    passages: Ragged
    """For each conversation a hash of every eight consecutive words of a message, some of them twice.

    A message of fewer words is taken together with the one before it, since a short answer is recognized only with its
    question; where both together are shorter, the two are one passage.
    """


def hash_words(conversations: Sequence[Sequence[str]]) -> WordHashes:
    r"""Return the hashes of conversations, each of which is the texts of its messages.

    A word is what `\w+` finds in lower case; case and punctuation make no difference.
    """
    said = [text.lower() for texts in conversations for text in texts]
    spelled = "\n".join(["", *said, ""])  # so that no word is at either end
    codes = numpy.frombuffer(spelled.encode("utf-32-le", "surrogatepass"), "<u4")
    inside = _are_of_words(codes)
    edges = numpy.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    after = numpy.cumsum([len(text) + 1 for text in said], dtype=numpy.int64)  # each message
    lengths = numpy.diff(numpy.searchsorted(starts, after), prepend=0)
    messages = Ragged(_digest(Ragged(codes[inside], ends - starts)), lengths)
    turns = numpy.fromiter(map(len, conversations), numpy.int64, len(conversations))
    whole = Ragged(_digest(messages), turns)
    return WordHashes(_digest(whole).view(numpy.int64), _passages(messages, whole))


def _are_of_words(codes: numpy.ndarray) -> numpy.ndarray:
    """Return for each character whether it is part of a word."""
    kinds = _KINDS[codes]
    if not kinds.all():
        for code in numpy.unique(codes[kinds == 0]).tolist():
            _KINDS[code] = _OF_WORDS if re.match(r"\w", chr(code)) else _OF_NONE
        kinds = _KINDS[codes]
    inside: numpy.ndarray = kinds == _OF_WORDS
    return inside


def _digest(lists: Ragged) -> numpy.ndarray:
    """Return one hash for each list of numbers, which depends on their order."""
    powers = numpy.cumprod(numpy.full(lists.lengths.max(initial=0), _BASE, numpy.uint64))
    sums = lists.sums(lists.values * powers[lists.places()])
    sums = (sums + lists.lengths.astype(numpy.uint64)) * _BASE
    mixed: numpy.ndarray = sums ^ (sums >> numpy.uint64(32))  # else words of two messages could change places
    return mixed


def _passages(messages: Ragged, conversations: Ragged) -> Ragged:
    is_first = numpy.zeros(len(messages.lengths), dtype=bool)
    is_first[conversations.starts] = True
    alone = is_first | (messages.lengths >= _SHARED)
    starts = numpy.where(alone, messages.starts, numpy.roll(messages.starts, 1))
    sizes = messages.ends - starts
    ends = len(messages.values) + 1  # a message without words may begin after the last
    padded = numpy.concatenate([messages.values, numpy.zeros(_SHARED, numpy.uint64)])
    windows = numpy.sum([padded[k : ends + k] * _POWERS[k] for k in range(_SHARED)], axis=0)
    counts = numpy.maximum(1, sizes - _SHARED + 1)
    found = Ragged(_taken(windows, starts, counts), counts)
    short = sizes < _SHARED
    found.values[found.starts[short]] = _digest(
        Ragged(_taken(messages.values, starts[short], sizes[short]), sizes[short])
    )
    return Ragged(found.values.view(numpy.int64), Ragged(counts, conversations.lengths).sums(counts))


def _taken(values: numpy.ndarray, starts: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the values of several ranges, one range after another."""
    lists = Ragged(numpy.empty(int(lengths.sum())), lengths)
    taken: numpy.ndarray = values[lists.places() + numpy.repeat(starts, lengths)]
    return taken
