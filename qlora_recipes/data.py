"""From a dataset to the token ids that are trained on, with a count of every row dropped and why."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from qlora_recipes.encoding import ConversationEncoder, Encoded
from qlora_recipes.errors import DataError
from qlora_recipes.formatters import Message, Reason, RowError, check_messages, detect
from qlora_recipes.reading import read_rows
from qlora_recipes.runs import DataReceipt, TemplateReceipt
from qlora_recipes.settings import Settings

Formatter = Callable[[Mapping[str, Any]], list[Message]]
TOO_LONG = "no answer within max_length"
"""Why a row is dropped of which the cut leaves nothing to learn."""


@dataclass(frozen=True)
class Conversation:
    """One usable row."""

    place: str
    """Where it stands in its file, such as `line 3`."""
    messages: list[Message]
    encoded: Encoded
    """Cut to max_length."""
    supervised_lost: int
    """Tokens of the answers that the cut took away."""
    truncated: bool


@dataclass(frozen=True)
class PreparedData:
    """The rows of one run, ready to be trained on."""

    train: list[Conversation]
    held_out: list[Conversation]
    receipt: DataReceipt
    template: TemplateReceipt

    @staticmethod
    def dataset(conversations: list[Conversation]) -> Dataset:
        """Return conversations as the tokenised dataset that SFTTrainer takes as it is."""
        return Dataset.from_dict(
            {
                "input_ids": [conversation.encoded.input_ids for conversation in conversations],
                "labels": [conversation.encoded.labels for conversation in conversations],
            }
        )


def prepare(settings: Settings, encoder: ConversationEncoder) -> PreparedData:
    """Read, format, encode and split the rows of a run.

    The split depends on the text of the first question alone: it is the same for every seed, and rows that ask the
    same stay on one side.

    Raises:
        DataError: when the source cannot be read, or no row of it can be used.
    """
    dropped: Counter[str] = Counter()
    rows = _formatted(settings, dropped)
    conversations = list(_encoded(rows, encoder, settings.training["max_length"], dropped))
    rows_in = len(conversations) + dropped.total()
    if not conversations:
        raise DataError(_nothing_usable(settings, dropped))
    keep = _held_out(conversations, settings.data.held_out)
    train = [conversation for conversation in conversations if _key(conversation) not in keep]
    held_out = [conversation for conversation in conversations if _key(conversation) in keep]
    return PreparedData(
        train=train,
        held_out=held_out,
        receipt=_data_receipt(settings, train, held_out, rows_in, dropped),
        template=_template_receipt(encoder, train),
    )


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
        raise RowError(Reason.NOT_AN_OBJECT, f"{where} is {type(row).__name__}, wanted names with values")
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
) -> Iterator[Conversation]:
    for place, messages in rows:
        try:
            whole = encoder.encode(messages)
        except RowError as error:
            dropped[error.reason] += 1
            continue
        cut = whole.cut(max_length)
        if not cut.supervised:
            dropped[TOO_LONG] += 1
            continue
        yield Conversation(
            place=place,
            messages=messages,
            encoded=cut,
            supervised_lost=whole.supervised - cut.supervised,
            truncated=len(whole.input_ids) > max_length,
        )


def _key(conversation: Conversation) -> str:
    question = next(message["content"] for message in conversation.messages if message["role"] == "user")
    return hashlib.sha256(question.encode()).hexdigest()


def _held_out(conversations: list[Conversation], share: float) -> set[str]:
    """Return the keys kept from training: those with the smallest hashes, so that order and seed play no part."""
    keys = sorted({_key(conversation) for conversation in conversations})
    return set(keys[: min(math.ceil(share * len(keys)), len(keys) - 1)])


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


def _data_receipt(
    settings: Settings,
    train: list[Conversation],
    held_out: list[Conversation],
    rows_in: int,
    dropped: Counter[str],
) -> DataReceipt:
    digest = hashlib.sha256()
    for conversation in train:
        digest.update(json.dumps(conversation.messages, ensure_ascii=False).encode())
    return DataReceipt(
        source=settings.dataset_name,
        fingerprint=digest.hexdigest(),
        rows_in=rows_in,
        rows_used=len(train),
        rows_held_out=len(held_out),
        rows_dropped=dict(dropped),
        tokens=sum(len(conversation.encoded.input_ids) for conversation in train),
        supervised_tokens=sum(conversation.encoded.supervised for conversation in train),
        rows_truncated=sum(conversation.truncated for conversation in train),
        answers_truncated=sum(conversation.supervised_lost > 0 for conversation in train),
        supervised_tokens_lost=sum(conversation.supervised_lost for conversation in train),
        max_length=settings.training["max_length"],
    )


def _template_receipt(encoder: ConversationEncoder, train: list[Conversation]) -> TemplateReceipt:
    bos = encoder.tokenizer.bos_token_id
    end = encoder.tokenizer.eos_token_id
    counts = [conversation.encoded.input_ids.count(bos) * (bos != end) for conversation in train]
    ends = [conversation.encoded.labels[-1] == end for conversation in train if not conversation.truncated]
    return TemplateReceipt(
        name=encoder.template.path.name,
        sha256=encoder.template.sha256,
        role_markers=encoder.template.role_markers,
        bos_per_row=[min(counts), max(counts)],
        end_token=str(encoder.tokenizer.eos_token),
        end_token_trained=all(ends),
    )
