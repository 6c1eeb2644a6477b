"""A few numbers for each row, taken while rows are written, so that checks need not read all of them again.

They take 64 bytes of memory per row. Knows nothing of verdicts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy

from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.formatters import TEXT, answer_of, is_trained, words_of

FIGURES = numpy.dtype(
    [
        ("dataset", "u1"),  # its place in the recipe's list
        ("question", "u8"),  # hash of the first question; among a million, two collide once in 37 million times
        ("words", "i8"),  # hash of all words, as this process hashes
        ("length", "i4"),  # tokens
        ("supervised", "i4"),  # tokens in the loss
        ("supervised_lost", "i4"),  # tokens of the answers that truncation removed
        ("truncated", "?"),
        ("largest_id", "i4"),
        ("unknown", "i4"),  # unknown tokens
        ("padding", "?"),  # contains the padding token
        ("bos", "i4"),  # BOS tokens; none where BOS is the end-of-turn token
        ("starts_with_bos", "?"),
        ("doubled_bos", "?"),  # two in succession
        ("ends", "i4"),  # answers in the loss that end as the template ends a turn
        ("last_is_end", "?"),  # the last answer is one of them
        ("controls_fit", "?"),  # its control tokens are those that its turns require
        ("control_text", "?"),  # a control token is spelled out in a message
        ("answers", "i4"),  # turns in the loss
        ("wordless_answers", "i4"),
        ("one_word_answers", "i4"),
    ]
)
_NO_TOKEN = -1


class RowMeter:
    """Measures rows made by one encoder."""

    def __init__(self, encoder: ConversationEncoder) -> None:
        tokenizer = encoder.tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        self._bos, self._pad, self._unknown = (_NO_TOKEN if token is None else token for token in ids)
        self._bos = _NO_TOKEN if self._bos in (encoder.end_id, tokenizer.eos_token_id) else self._bos
        self._eos, self._adds_bos, self._closes = tokenizer.eos_token_id, encoder.adds_bos, encoder.closes
        self._special_tokens = encoder.special_tokens
        self._controls = encoder.control_tokens
        self._structure = encoder.structure

    def measure(self, rows: Sequence[Conversation], dataset: int = 0) -> numpy.ndarray:
        """Return the FIGURES of rows of one dataset, one record for each."""
        return numpy.array([self._figures(row, dataset) for row in rows], FIGURES)

    def _figures(self, row: Conversation, dataset: int) -> tuple[int, ...]:
        texts = [text for message in row.messages for text in words_of(message)]
        question = next((message["content"] for message in row.messages if message["role"] == "user"), texts[0])
        answers = [answer_of(message) for message in row.messages if is_trained(message)]
        ids, labels = row.encoded.input_ids, row.encoded.labels
        needed, controls = self._structure(row.messages, row.tools), self._controls(ids)
        bos, is_text = ids.count(self._bos), row.messages[0]["role"] == TEXT
        closed = [labels[-1] == self._eos] if is_text else self._closes(labels)
        found = {
            "dataset": dataset,
            "question": int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]),
            "words": hash(tuple(map(words, texts))),
            "control_text": any(token in text for text in texts for token in self._special_tokens),
            "answers": len(answers),
            "wordless_answers": sum(not re.search(r"\w", answer) for answer in answers),
            "one_word_answers": sum(len(answer.split(maxsplit=1)) == 1 for answer in answers),
            "length": len(ids),
            "supervised": row.encoded.supervised,
            "supervised_lost": row.supervised_lost,
            "truncated": row.truncated,
            "largest_id": max(ids),
            "unknown": ids.count(self._unknown),
            "padding": self._pad in ids,
            "bos": bos,
            "starts_with_bos": ids[0] == self._bos or (is_text and not self._adds_bos),
            "doubled_bos": bos > 1 and (self._bos, self._bos) in pairwise(ids),
            "ends": sum(closed),
            "last_is_end": closed[-1:] == [True],
            "controls_fit": controls <= needed if row.truncated else controls == needed,
        }
        return tuple(found[name] for name in FIGURES.names or ())


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case, without punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))
