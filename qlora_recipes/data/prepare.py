"""From a dataset to the token ids that are trained on, with a count of every row dropped and why.

Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy

from qlora_recipes.data.arrow_rows import Batch, Conversation, answer_ids, answer_span, write_rows
from qlora_recipes.data.columns import ColumnUse, WatchedRow
from qlora_recipes.data.encoding import ConversationEncoder, Encoded, Rendered
from qlora_recipes.data.figures import RowMeter
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError
from qlora_recipes.formatters import (
    TEXT,
    Formatter,
    Message,
    Reason,
    RowError,
    Tools,
    check_conversation,
    detect,
    is_trained,
    preferences,
    split_reasoning,
    strings,
    words_of,
)
from qlora_recipes.formatters.preferences import pair
from qlora_recipes.recipe import DatasetSpec
from qlora_recipes.run.receipt import DataReceipt, DatasetReceipt, TemplateReceipt
from qlora_recipes.settings import Settings

_BATCH = 2**18  # characters encoded at once; each of their tokens takes 200 bytes meanwhile
_AHEAD = 2  # batches that are encoded while others are rendered and written
TOO_LONG = "no answer within max_length"
"""Why a row is dropped when truncation leaves nothing in the loss."""


class _Row(NamedTuple):
    """A row on its way from the file to the encoder."""

    place: str
    messages: list[Message]
    tools: Tools | None
    rejected: str | None
    """The other answer of a row of preferences."""
    source: Any
    """The row as it was read."""

    @property
    def characters(self) -> int:
        """How many are encoded, without those of the template."""
        texts = [text for messages, _ in self.conversations for message in messages for text in words_of(message)]
        return sum(map(len, texts)) + sum(map(len, strings(self.tools)))

    @property
    def conversations(self) -> list[tuple[list[Message], Tools | None]]:
        """What is rendered: the conversation, and of a row of preferences the one that ends with the other answer."""
        whole = (self.messages, self.tools)
        if self.rejected is None:
            return [whole]
        return [whole, ([*self.messages[:-1], {**self.messages[-1], "content": self.rejected}], self.tools)]


@dataclass(frozen=True)
class PreparedData:
    """The rows of one run, ready for training."""

    train: Sequence[Conversation]
    held_out: Sequence[Conversation]
    figures: numpy.ndarray
    """One record of FIGURES for each training row."""
    held_out_figures: numpy.ndarray
    receipt: DataReceipt
    template: TemplateReceipt


@dataclass
class _Tally:
    """What is counted while the rows of one dataset are read."""

    spec: DatasetSpec
    formatter: Formatter | None
    name: str
    """Stands before the places of its rows, where there are several datasets."""
    of_preferences: bool
    dropped: Counter[str] = field(default_factory=Counter)
    contents: Counter[str] = field(default_factory=Counter)
    figures: list[numpy.ndarray] = field(default_factory=list)
    columns: ColumnUse = field(default_factory=ColumnUse)
    revision: str | None = None


def prepare(
    settings: Settings, encoder: ConversationEncoder, advance: Callable[[int], object] = lambda rows: None
) -> PreparedData:
    """Read, format, encode and split the rows of a run, only a few of which are in memory at a time.

    `advance` is told of every batch how many rows it had.
    The split depends only on the text of the first question: it is the same for every seed, and rows with the same
    first question stay on one side. The draw of a dataset's share depends only on the places of its rows.

    Raises:
        DataError: when a source cannot be read, or no row of it can be used.
        SetupError: when the disk has no room for the encoded rows.
    """
    several, of_preferences = len(settings.datasets) > 1, settings.of_preferences
    tallies = [
        _Tally(spec, settings.recipe.formatter(spec), f"{Path(spec.source).name}, " if several else "", of_preferences)
        for spec in settings.datasets
    ]
    max_length = settings.training["max_length"]
    rows = write_rows(
        batch for number, tally in enumerate(tallies) for batch in _encoded(tally, number, encoder, max_length, advance)
    )
    # Workers may fork from here on, without the tokenizers' threads; if this is unset, each prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for tally in tallies:
        if not any(map(len, tally.figures)):
            raise DataError(_nothing_usable(tally, encoder))
    every = numpy.concatenate([part for tally in tallies for part in tally.figures])
    for tally in tallies:
        tally.figures.clear()  # 64 bytes a row, which are in `every` now
    held_out = _held_out(settings.datasets, every)
    train, figures = rows.where(~held_out), every[~held_out]
    digest = hashlib.sha256()
    for words in train.words_as_json():
        digest.update(words.encode())
    return PreparedData(
        train=train,
        held_out=rows.where(held_out),
        figures=figures,
        held_out_figures=every[held_out],
        receipt=_data_receipt(settings, digest.hexdigest(), figures, every[held_out], tallies),
        template=_template_receipt(encoder, figures),
    )


def _held_out(datasets: Sequence[DatasetSpec], every: numpy.ndarray) -> numpy.ndarray:
    """Return which rows are held out: those of the smallest hashes in each dataset, whatever the order and the seed."""
    held_out = numpy.zeros(len(every), dtype=bool)
    for number, spec in enumerate(datasets):
        own = every["dataset"] == number
        distinct = numpy.unique(every["question"][own])
        count = min(math.ceil(spec.held_out * len(distinct)), len(distinct) - 1)
        held_out |= own & (every["question"] < distinct[count])
    # a question that is in several datasets stays on one side too
    held_out = numpy.isin(every["question"], every["question"][held_out])
    if held_out.all():
        raise DataError("every question of one dataset is held out for another, which has it too; lower held_out")
    return held_out


def _formatted(tally: _Tally, encoder: ConversationEncoder) -> Iterator[_Row | str]:
    """Yield the rows of a dataset as conversations, or the reason why one is none."""
    spec = tally.spec
    rows = read_rows(spec.source, split=spec.split, revision=spec.revision)
    tally.revision = rows.revision
    for place, row in rows:
        if spec.share < 1 and not _is_drawn(place, spec.share):
            continue
        try:
            yield _format_row(tally, WatchedRow(row) if isinstance(row, dict) else row, place, encoder)
        except RowError as error:
            yield error.reason


def _is_drawn(place: str, share: float) -> bool:
    """Whether a row belongs to a share of its dataset: by a hash of its place, so that every arm draws the same."""
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:8]) < share * 2**64


def _format_row(tally: _Tally, row: Any, place: str, encoder: ConversationEncoder) -> _Row:
    """Return one row as a conversation; the first valid row decides for its file which formatter fits.

    Raises:
        RowError: when the row cannot be used.
    """
    spec, where = tally.spec, f"{tally.spec.source}, {place}"
    tally.formatter = tally.formatter or (preferences if tally.of_preferences else _detect(row, where))
    messages, tools, rejected = _format(tally.formatter, row, where, pairs=tally.of_preferences)
    if spec.system and messages[0]["role"] not in ("system", "developer", TEXT):
        messages = [{"role": "system", "content": spec.system.strip()}, *messages]
    if encoder.knows_reasoning:
        messages = split_reasoning(messages)
    return _Row(f"{tally.name}{place}", messages, tools, rejected, row)


def _rendered(
    batch: Sequence[_Row | str], encoder: ConversationEncoder
) -> tuple[list[_Row], list[str], list[Rendered]]:
    """Return the rows that can be used, why each of the others cannot, and the conversations of the former rendered."""
    texts = iter(encoder.render_each([one for row in batch if isinstance(row, _Row) for one in row.conversations]))
    usable, dropped, rendered = [], [], []
    for row in batch:
        if isinstance(row, str):
            dropped.append(row)
            continue
        own = [_whole(next(texts), *one, encoder) for one in row.conversations]
        error = next((text for text in own if isinstance(text, RowError)), None)
        if error:
            dropped.append(error.reason)
        else:
            usable.append(row)
            rendered += cast("list[Rendered]", own)
    return usable, dropped, rendered


def _whole(
    rendered: Rendered | RowError, messages: list[Message], tools: Tools | None, encoder: ConversationEncoder
) -> Rendered | RowError:
    """Return the text of a conversation, or the error where the template does not render all of it."""
    if isinstance(rendered, RowError):
        return rendered
    left_out = list(encoder.fate(messages, tools).left_out)
    if any(message["content"] not in rendered.text for message in messages if is_trained(message)):
        left_out.append("words of the answer")  # such as what follows </think> in an answer that quotes it
    if left_out:
        what = f"{', '.join(left_out[:4])}{' and more' if len(left_out) > 4 else ''}"
        return RowError(Reason.LEFT_OUT, f"{encoder.template.name} does not render {what}")
    return rendered


def _detect(row: Any, where: str) -> Formatter:
    if not isinstance(row, Mapping):
        raise RowError(Reason.NOT_AN_OBJECT, f"{where} is {type(row).__name__}, expected names with values")
    try:
        return detect(row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _format(
    formatter: Formatter, row: Any, place: str, *, pairs: bool
) -> tuple[list[Message], Tools | None, str | None]:
    """Apply a formatter, and name the row in whatever error it raises."""
    name = getattr(formatter, "__name__", "format_row")
    try:
        found: Any = formatter(row)
        if not pairs:
            return *check_conversation(found, source=name), None
        if not isinstance(found, Mapping) or not {"messages", "rejected"} <= found.keys():
            raise RowError(Reason.NOT_A_PAIR, f"{name} gave no messages and rejected, expected both")
        answer = {"role": "assistant", "content": found["rejected"]}
        found = pair(found, {**found, "messages": [*found["messages"][:-1], answer]})
        return found["messages"], found.get("tools"), found["rejected"]
    except RowError:
        raise
    except Exception as error:  # a user's formatter can raise anything
        columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(
            f"{place}: {name} failed with {type(error).__name__}: {error}. The row has {columns}. "
            "Fix the formatter, or let it raise RowError(reason, detail) for rows that should be left out"
        ) from error


def _encoded(
    tally: _Tally, number: int, encoder: ConversationEncoder, max_length: int, advance: Callable[[int], object]
) -> Iterator[Batch]:
    """Yield usable rows in batches, and append the figures of each batch to the tally."""
    meter = RowMeter(encoder)
    for batch, encoded in _tokenized(_batches(_formatted(tally, encoder)), tally, encoder):
        usable = Batch()
        for row in batch:
            whole, other = next(encoded), next(encoded) if row.rejected is not None else None
            tally.columns.add(row.source)
            if other and _prompt_of(whole) != _prompt_of(other):
                tally.dropped[Reason.NOT_A_PAIR] += 1
                continue
            cut, other = whole.cut(max_length), other.cut(max_length) if other else None
            if cut.supervised and (other is None or other.supervised):
                answers = (row.rejected, answer_ids(other)) if other else ()
                lost = 0 if cut is whole else whole.supervised - cut.supervised
                usable.append(Conversation(row.place, row.messages, cut, lost, cut is not whole, row.tools, *answers))
            else:
                tally.dropped[TOO_LONG] += 1
        _count_contents(tally.contents, usable, encoder)
        tally.figures.append(meter.measure(usable, number))
        advance(len(batch))
        yield usable


def _tokenized(
    batches: Iterator[list[_Row | str]], tally: _Tally, encoder: ConversationEncoder
) -> Iterator[tuple[list[_Row], Iterator[Encoded]]]:
    """Yield the rows of each batch that can be used, with the tokens of all their conversations; count the others.

    The tokenizer works in threads while the next rows are rendered; not so for a template that is not trusted, whose
    memory limit is one of the whole process.
    """
    waiting: deque[tuple[list[_Row], list[str], Future[list[Encoded]]]] = deque()

    def finished() -> tuple[list[_Row], Iterator[Encoded]]:
        usable, dropped, tokens = waiting.popleft()
        tally.dropped.update(dropped)
        return usable, iter(tokens.result())

    with ThreadPoolExecutor(_AHEAD) as pool:
        for batch in batches:
            usable, dropped, rendered = _rendered(batch, encoder)
            waiting.append((usable, dropped, pool.submit(encoder.tokenize, rendered)))
            if len(waiting) > _AHEAD or not encoder.is_trusted:
                yield finished()
        while waiting:
            yield finished()


def _prompt_of(row: Encoded) -> list[int]:
    return row.input_ids[: answer_span(row.labels)[0]]


def _count_contents(contents: Counter[str], rows: Sequence[Conversation], encoder: ConversationEncoder) -> None:
    """Count what rows hold: their messages by role, and what few rows have."""
    contents.update([message["role"] for row in rows for message in row.messages])
    for row in rows:
        messages = row.messages
        if row.tools is not None:
            contents["rows with tools"] += 1
        if row.rejected is not None:
            contents["preferences"] += 1
        if any(len(message) > 2 for message in messages):
            contents["calls"] += sum(len(message.get("tool_calls", ())) for message in messages)
            contents["reasoning"] += sum("reasoning_content" in message for message in messages)
            contents["reasoning left out by the template"] += encoder.fate(messages, row.tools).forgotten
            contents["assistant outside the loss"] += sum(message.get("train") is False for message in messages)


def _batches(rows: Iterator[_Row | str]) -> Iterator[list[_Row | str]]:
    """Yield rows in batches that the tokenizer encodes at once."""
    batch: list[_Row | str] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += row.characters if isinstance(row, _Row) else len(row)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _nothing_usable(tally: _Tally, encoder: ConversationEncoder) -> str:
    """Say what was expected, and show the first row."""
    spec = tally.spec
    place, row = next(read_rows(spec.source, split=spec.split, revision=spec.revision))
    if not tally.dropped:
        return f"a share of {spec.share:g} draws no row of {spec.source}; raise it, or leave the dataset out"
    shown = json.dumps(row, ensure_ascii=False, default=str)
    try:
        for one in _format_row(tally, row, place, encoder).conversations:
            if isinstance(text := _whole(encoder.render(*one), *one, encoder), RowError):
                raise text
        why = "nothing by itself; it is longer than max_length"
    except RowError as error:
        why = str(error)
    counts = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common())
    fix = "Give the recipe a formatter that fits these rows (qlora_recipes.formatters), or your own format_row"
    if tally.dropped.keys() <= {Reason.LEFT_OUT, Reason.TEMPLATE}:
        fix = "Take a model whose chat template has a place for it (--model), or leave it out in your own format_row"
    return (
        f"no row of {spec.source} can be used ({counts}).\n  the first ({place}): "
        f"{shown[:300]}{'...' if len(shown) > 300 else ''}\n  what is wrong with it: {why}\n  {fix}"
    )


def _data_receipt(
    settings: Settings, fingerprint: str, figures: numpy.ndarray, held_out: numpy.ndarray, tallies: Sequence[_Tally]
) -> DataReceipt:
    dropped, contents, unread = (Counter[str]() for _ in range(3))
    datasets = []
    for number, tally in enumerate(tallies):
        dropped.update(tally.dropped)
        contents.update(tally.contents)
        unread.update(tally.columns.unread())
        used = figures[figures["dataset"] == number]
        kept = int((held_out["dataset"] == number).sum())
        datasets.append(
            DatasetReceipt(
                source=settings.dataset_names[number],
                share=tally.spec.share,
                rows_in=len(used) + kept + tally.dropped.total(),
                rows_used=len(used),
                rows_held_out=kept,
                rows_dropped=dict(tally.dropped),
                tokens=int(used["length"].sum()),
                supervised_tokens=int(used["supervised"].sum()),
                revision=tally.revision,
            )
        )
    return DataReceipt(
        source=settings.dataset_name,
        fingerprint=fingerprint,
        rows_in=len(figures) + len(held_out) + dropped.total(),
        rows_used=len(figures),
        rows_held_out=len(held_out),
        rows_dropped=dict(dropped),
        tokens=int(figures["length"].sum()),
        supervised_tokens=int(figures["supervised"].sum()),
        rows_truncated=int(figures["truncated"].sum()),
        answers_truncated=int((figures["supervised_lost"] > 0).sum()),
        supervised_tokens_lost=int(figures["supervised_lost"].sum()),
        max_length=settings.training["max_length"],
        columns_unread=dict(unread),
        revision=tallies[0].revision if len(tallies) == 1 else None,
        contents={name: count for name, count in contents.items() if count},
        datasets=datasets if len(datasets) > 1 or datasets[0].share < 1 else [],
    )


def _template_receipt(encoder: ConversationEncoder, figures: numpy.ndarray) -> TemplateReceipt:
    return TemplateReceipt(
        name=encoder.template.name,
        origin=encoder.template.origin,
        date=encoder.template.date,
        sha256=encoder.template.sha256,
        role_markers=encoder.template.role_markers,
        bos_per_row=[int(figures["bos"].min()), int(figures["bos"].max())],
        end_token=encoder.end_token,
        end_token_trained=bool((figures["truncated"] | figures["last_is_end"]).all()),
    )
