"""From a dataset to the token ids that are trained on, with a count of every row dropped and why."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from datasets import Dataset

from qlora_recipes.data.arrow_rows import Conversation, Rows, write_rows
from qlora_recipes.data.encoding import ConversationEncoder, Encoded, Rendered
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError
from qlora_recipes.formatters import Message, Reason, RowError, check_messages, detect
from qlora_recipes.run.receipt import DataReceipt, TemplateReceipt
from qlora_recipes.settings import Settings

_BATCH = 2**18  # characters encoded at once; a token of them takes 200 bytes for that moment
Formatter = Callable[[Mapping[str, Any]], list[Message]]
TOO_LONG = "no answer within max_length"
"""Why a row is dropped of which the cut leaves nothing to learn."""


@dataclass(frozen=True)
class PreparedData:
    """The rows of one run, ready to be trained on."""

    train: Sequence[Conversation]
    held_out: Sequence[Conversation]
    receipt: DataReceipt
    template: TemplateReceipt

    @staticmethod
    def dataset(conversations: Rows) -> Dataset:
        """Return conversations as the tokenized dataset that SFTTrainer takes as it is, read from disk."""
        return conversations.dataset()


def prepare(settings: Settings, encoder: ConversationEncoder) -> PreparedData:
    """Read, format, encode and split the rows of a run, which go through memory a few at a time.

    The split depends on the text of the first question alone: it is the same for every seed, and rows that ask the
    same stay on one side.

    Raises:
        DataError: when the source cannot be read, or no row of it can be used.
        SetupError: when there is no room on disk for the encoded rows.
    """
    dropped: Counter[str] = Counter()
    formatted = _formatted(settings, dropped)
    rows = write_rows(_encoded(formatted, encoder, settings.training["max_length"], dropped))
    # From here on workers may fork, in which tokenizers' threads are not alive; unset, each would print a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not rows:
        raise DataError(_nothing_usable(settings, dropped))
    held_out = _held_out(rows, settings.data.held_out)
    train = rows.where(~held_out)
    data_receipt, template_receipt = _receipts(settings, encoder, train, len(rows), dropped)
    return PreparedData(train, rows.where(held_out), data_receipt, template_receipt)


def _formatted(settings: Settings, dropped: Counter[str]) -> Iterator[tuple[str, list[Message]]]:
    formatter = settings.recipe.formatter()
    for place, row in read_rows(settings.dataset, split=settings.data.split, revision=settings.data.revision):
        where = f"{settings.dataset}, {place}"
        try:
            formatter = formatter or _detect(row, where)  # the first whole row decides for the file
            yield place, _format(formatter, row, where)
        except RowError as error:
            dropped[error.reason] += 1


def _detect(row: Any, where: str) -> Formatter:
    if not isinstance(row, Mapping):
        raise RowError(Reason.NOT_AN_OBJECT, f"{where} is {type(row).__name__}, expected names with values")
    try:
        return detect(row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _format(formatter: Formatter, row: Any, place: str) -> list[Message]:
    """Apply a formatter of anybody's; what it fails with is named with the row it failed on."""
    name = getattr(formatter, "__name__", "format_row")
    try:
        return check_messages(formatter(row), source=name)
    except RowError:
        raise
    except Exception as error:  # anybody's code fails with anything
        columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(
            f"{place}: {name} failed with {type(error).__name__}: {error}. The row has {columns}. "
            "Mend the formatter, or let it raise RowError(reason, detail) for rows to leave out"
        ) from error


def _encoded(
    rows: Iterator[tuple[str, list[Message]]], encoder: ConversationEncoder, max_length: int, dropped: Counter[str]
) -> Iterator[list[Conversation]]:
    for batch in _rendered(rows, encoder, dropped):
        wholes = encoder.tokenize([rendered for _, _, rendered in batch])
        conversations = [
            _conversation(place, messages, whole, max_length)
            for (place, messages, _), whole in zip(batch, wholes, strict=True)
        ]
        usable = [conversation for conversation in conversations if conversation.encoded.supervised]
        if len(usable) < len(batch):
            dropped[TOO_LONG] += len(batch) - len(usable)
        yield usable


def _rendered(
    rows: Iterator[tuple[str, list[Message]]], encoder: ConversationEncoder, dropped: Counter[str]
) -> Iterator[list[tuple[str, list[Message], Rendered]]]:
    """Yield rows and their text in batches of as many as the tokenizer takes at once."""
    batch, characters = [], 0
    for place, messages in rows:
        try:
            rendered = encoder.render(messages)
        except RowError as error:
            dropped[error.reason] += 1
            continue
        batch.append((place, messages, rendered))
        characters += len(rendered.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _conversation(place: str, messages: list[Message], whole: Encoded, max_length: int) -> Conversation:
    cut = whole.cut(max_length)
    return Conversation(
        place=place,
        messages=messages,
        encoded=cut,
        supervised_lost=whole.supervised - cut.supervised,
        truncated=len(whole.input_ids) > max_length,
    )


def _held_out(rows: Sequence[Conversation], share: float) -> numpy.ndarray:
    """Return for each row whether it is kept from training: those whose keys are smallest, whatever order and seed."""
    keys = numpy.fromiter(map(_key, rows), numpy.uint64, len(rows))
    distinct = numpy.unique(keys)
    count = min(math.ceil(share * len(distinct)), len(distinct) - 1)
    return keys < distinct[count]


def _key(conversation: Conversation) -> int:
    """Return the first 64 bits of the first question's hash: of a million, two are alike once in 37 million times."""
    question = next(message["content"] for message in conversation.messages if message["role"] == "user")
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8])


def _nothing_usable(settings: Settings, dropped: Counter[str]) -> str:
    """Say what was expected, with the first row beside it."""
    place, row = next(read_rows(settings.dataset, split=settings.data.split, revision=settings.data.revision))
    shown = json.dumps(row, ensure_ascii=False, default=str)
    try:
        formatter = settings.recipe.formatter() or _detect(row, place)
        check_messages(formatter(row), source=getattr(formatter, "__name__", "format_row"))
        why = "none by itself; it is longer than max_length, or its text holds the template's own role markers"
    except RowError as error:
        why = str(error)
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    return (
        f"no row of {settings.dataset} can be used ({counts}).\n  the first ({place}): "
        f"{shown[:300]}{'...' if len(shown) > 300 else ''}\n  its fault: {why}\n"
        "  Give the recipe a formatter that fits these rows (qlora_recipes.formatters), or a format_row of your own"
    )


@dataclass
class _Counts:
    """What the rows that are trained on add up to."""

    tokens: int = 0
    supervised: int = 0
    supervised_lost: int = 0
    truncated: int = 0
    answers_truncated: int = 0
    fewest_bos: float = math.inf
    most_bos: int = 0
    end_token_trained: bool = True

    def add(self, row: Conversation, bos: int | None, end: int) -> None:
        self.tokens += len(row.encoded.input_ids)
        self.supervised += row.encoded.supervised
        self.supervised_lost += row.supervised_lost
        self.truncated += row.truncated
        self.answers_truncated += row.supervised_lost > 0
        beginnings = row.encoded.input_ids.count(bos) * (bos != end)
        self.fewest_bos, self.most_bos = min(self.fewest_bos, beginnings), max(self.most_bos, beginnings)
        self.end_token_trained &= row.truncated or row.encoded.labels[-1] == end


def _receipts(
    settings: Settings, encoder: ConversationEncoder, train: Rows, usable: int, dropped: Counter[str]
) -> tuple[DataReceipt, TemplateReceipt]:
    tokenizer, counts, digest = encoder.tokenizer, _Counts(), hashlib.sha256()
    for row in train:
        counts.add(row, tokenizer.bos_token_id, tokenizer.eos_token_id)
        digest.update(json.dumps(row.messages, ensure_ascii=False).encode())
    data = DataReceipt(
        source=settings.dataset_name,
        fingerprint=digest.hexdigest(),
        rows_in=usable + dropped.total(),
        rows_used=len(train),
        rows_held_out=usable - len(train),
        rows_dropped=dict(dropped),
        tokens=counts.tokens,
        supervised_tokens=counts.supervised,
        rows_truncated=counts.truncated,
        answers_truncated=counts.answers_truncated,
        supervised_tokens_lost=counts.supervised_lost,
        max_length=settings.training["max_length"],
    )
    template = TemplateReceipt(
        name=encoder.template.path.name,
        sha256=encoder.template.sha256,
        role_markers=encoder.template.role_markers,
        bos_per_row=[int(counts.fewest_bos), counts.most_bos],
        end_token=str(tokenizer.eos_token),
        end_token_trained=counts.end_token_trained,
    )
    return data, template
