"""A few numbers for each row, taken while rows are written, so that checks need not read all of them again.

They take 64 bytes of memory per row. Knows nothing of verdicts.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy

from qlora_recipes.data.arrow_rows import Batch, Conversation
from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.ragged import Ragged
from qlora_recipes.formatters import TEXT, answer_of, is_trained, words_of

FIGURES = numpy.dtype(
    [
        ("dataset", "u1"),  # its place in the recipe's list
        ("question", "u8"),  # hash of the first question; among a million, two collide once in 37 million times
        ("words", "i8"),  # hash of all words, see words.py
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
        self._eos, self._encoder = tokenizer.eos_token_id, encoder
        special = [re.escape(token) for token in encoder.special_tokens]
        self._special = re.compile("|".join(special) or "(?!)")

    def measure(self, rows: Batch | Sequence[Conversation], dataset: int = 0) -> numpy.ndarray:
        """Return the FIGURES of rows of one dataset, one record for each."""
        batch = rows if isinstance(rows, Batch) else Batch.of(rows)
        found = numpy.zeros(len(batch.rows), FIGURES)
        if not batch.rows:
            return found
        found["dataset"] = dataset
        found["words"] = batch.hashes.whole
        found["supervised_lost"] = batch.supervised_lost
        found["truncated"] = batch.truncated
        self._measure_texts(batch, found)
        self._measure_ids(batch, found)
        self._measure_labels(batch, found)
        return found

    def _measure_texts(self, batch: Batch, found: numpy.ndarray) -> None:
        for row, record in zip(batch.rows, found, strict=True):
            texts = [text for message in row.messages for text in words_of(message)]
            question = next((message["content"] for message in row.messages if message["role"] == "user"), texts[0])
            answers = [answer_of(message) for message in row.messages if is_trained(message)]
            record["question"] = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8])
            record["control_text"] = any(self._special.search(text) for text in texts)
            record["answers"] = len(answers)
            record["wordless_answers"] = sum(not re.search(r"\w", answer) for answer in answers)
            record["one_word_answers"] = sum(len(answer.split(maxsplit=1)) == 1 for answer in answers)

    def _measure_ids(self, batch: Batch, found: numpy.ndarray) -> None:
        ids = batch.encoded.ids
        is_bos = ids.values == self._bos
        found["length"] = ids.lengths
        found["largest_id"] = numpy.maximum.reduceat(ids.values, ids.starts)
        found["unknown"] = ids.sums(ids.values == self._unknown)
        found["padding"] = ids.sums(ids.values == self._pad) > 0
        found["bos"] = ids.sums(is_bos)
        found["starts_with_bos"] = is_bos[ids.starts] | (_are_texts(batch) & (not self._encoder.adds_bos))
        follows = is_bos & numpy.roll(is_bos, 1)
        follows[ids.starts] = False
        found["doubled_bos"] = ids.sums(follows) > 0
        is_control = numpy.isin(ids.values, list(self._encoder.control_ids))
        controls = Ragged(ids.values[is_control], ids.sums(is_control))
        for i, (row, start, end) in enumerate(zip(batch.rows, controls.starts, controls.ends, strict=True)):
            own, needed = Counter(controls.values[start:end].tolist()), self._encoder.structure(row.messages, row.tools)
            found["controls_fit"][i] = own <= needed if batch.truncated[i] else dict.__eq__(own, needed)

    def _measure_labels(self, batch: Batch, found: numpy.ndarray) -> None:
        labels, is_text = batch.encoded.labels, _are_texts(batch)
        closed, last = self._encoder.closes(labels), labels.values[labels.ends - 1] == self._eos
        found["supervised"] = batch.encoded.supervised
        ends, at_the_end = closed.sums(closed.values), numpy.zeros(len(found), dtype=bool)
        at_the_end[closed.lengths > 0] = closed.values[closed.ends[closed.lengths > 0] - 1]
        found["ends"] = numpy.where(is_text, last, ends)
        found["last_is_end"] = numpy.where(is_text, last, at_the_end)


def _are_texts(batch: Batch) -> numpy.ndarray:
    return numpy.array([row.messages[0]["role"] == TEXT for row in batch.rows])
