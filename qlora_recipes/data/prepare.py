"""From a dataset to the token ids that are trained on, with a count of every row dropped and why.

Knows nothing of models.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy

from qlora_recipes.data.arrow_rows import Batch, Conversation, answer_ids, answer_span, write_rows
from qlora_recipes.data.conversations import Row, Tally, format_row, formatted
from qlora_recipes.data.encoded import Encoded, EncodedBatch
from qlora_recipes.data.encoding import ConversationEncoder, Rendered
from qlora_recipes.data.figures import RowMeter
from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError
from qlora_recipes.formatters import (
    Message,
    Reason,
    RowError,
    Tools,
    is_trained,
)
from qlora_recipes.recipe import DatasetSpec
from qlora_recipes.run.receipt import DataReceipt, DatasetReceipt, TemplateReceipt
from qlora_recipes.settings import Settings

_BATCH = 2**18  # characters encoded at once; each of their tokens takes 200 bytes meanwhile
_OBJECTS = 50_000  # made between two searches for garbage; a row makes fifteen
_AHEAD = 2  # batches that are encoded while others are rendered and written
TOO_LONG = "no answer within max_length"
"""Why a row is dropped when truncation leaves nothing in the loss."""


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
        Tally(spec, settings.recipe.formatter(spec), f"{Path(spec.source).name}, " if several else "", of_preferences)
        for spec in settings.datasets
    ]
    max_length = settings.training["max_length"]
    with _rarely_collected():
        rows = write_rows(
            batch
            for number, tally in enumerate(tallies)
            for batch in _encoded(tally, number, encoder, max_length, advance)
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


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """Have Python look for garbage seldom, since it visits every token of the rows that are in memory each time."""
    often, *older = gc.get_threshold()
    gc.set_threshold(max(often, _OBJECTS) if often else 0, *older)
    try:
        yield
    finally:
        gc.set_threshold(often, *older)


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


def _rendered(batch: Sequence[Row | str], encoder: ConversationEncoder) -> tuple[list[Row], list[str], list[Rendered]]:
    """Return the rows that can be used, why each of the others cannot, and the conversations of the former rendered."""
    texts = iter(encoder.render_each([one for row in batch if isinstance(row, Row) for one in row.conversations]))
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
    trained = () if encoder.keeps_texts else filter(is_trained, messages)
    if any(message["content"] not in rendered.text for message in trained):
        left_out.append("words of the answer")  # such as what follows </think> in an answer that quotes it
    if left_out:
        what = f"{', '.join(left_out[:4])}{' and more' if len(left_out) > 4 else ''}"
        return RowError(Reason.LEFT_OUT, f"{encoder.template.name} does not render {what}")
    return rendered


def _encoded(
    tally: Tally, number: int, encoder: ConversationEncoder, max_length: int, advance: Callable[[int], object]
) -> Iterator[Batch]:
    """Yield usable rows in batches, and append the figures of each batch to the tally."""
    meter = RowMeter(encoder)
    for rows, encoded in _tokenized(_batches(formatted(tally, encoder.knows_reasoning)), tally, encoder):
        for row in rows:
            tally.columns.add(row.source)
        usable = _usable(rows, encoded, max_length, tally.dropped)
        _count_contents(tally.contents, usable.rows, encoder)
        tally.figures.append(meter.measure(usable, number))
        advance(len(rows))
        yield usable


def _usable(rows: Sequence[Row], encoded: EncodedBatch, max_length: int, dropped: Counter[str]) -> Batch:
    """Return the rows that have an answer within `max_length`, or two to one prompt; count the others."""
    whole, others, same = encoded, None, [True] * len(rows)
    if len(encoded) > len(rows):  # each is followed by the one with the other answer
        whole, others = encoded[::2], encoded[1::2]
        same = [_prompt_of(one) == _prompt_of(other) for one, other in zip(whole, others, strict=True)]
        others = others.cut(max_length)
    cut = whole.cut(max_length)
    chosen = numpy.array(same, dtype=bool) & (cut.supervised > 0)
    if others is not None:
        chosen &= others.supervised > 0
    reasons = (TOO_LONG if alike else Reason.NOT_A_PAIR for alike in same)
    dropped.update(reason for reason, fits in zip(reasons, chosen, strict=True) if not fits)
    return Batch(
        [row for row, fits in zip(rows, chosen, strict=True) if fits],
        cut.where(chosen),
        (whole.supervised - cut.supervised)[chosen],
        (whole.ids.lengths > cut.ids.lengths)[chosen],
        [None if others is None else answer_ids(others[int(i)]) for i in numpy.flatnonzero(chosen)],
    )


def _tokenized(
    batches: Iterator[list[Row | str]], tally: Tally, encoder: ConversationEncoder
) -> Iterator[tuple[list[Row], EncodedBatch]]:
    """Yield the rows of each batch that can be used, with the tokens of all their conversations; count the others.

    The tokenizer works in threads while the next rows are rendered; not so for a template that is not trusted, whose
    memory limit is one of the whole process.
    """
    waiting: deque[tuple[list[Row], list[str], Future[EncodedBatch]]] = deque()

    def finished() -> tuple[list[Row], EncodedBatch]:
        usable, dropped, tokens = waiting.popleft()
        tally.dropped.update(dropped)
        return usable, tokens.result()

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


def _count_contents(contents: Counter[str], rows: Sequence[Row | Conversation], encoder: ConversationEncoder) -> None:
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


def _batches(rows: Iterator[Row | str]) -> Iterator[list[Row | str]]:
    """Yield rows in batches that the tokenizer encodes at once."""
    batch: list[Row | str] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += row.characters if isinstance(row, Row) else len(row)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _nothing_usable(tally: Tally, encoder: ConversationEncoder) -> str:
    """Say what was expected, and show the first row."""
    spec = tally.spec
    place, row = next(read_rows(spec.source, split=spec.split, revision=spec.revision))
    if not tally.dropped:
        return f"a share of {spec.share:g} draws no row of {spec.source}; raise it, or leave the dataset out"
    shown = json.dumps(row, ensure_ascii=False, default=str)
    try:
        for one in format_row(tally, row, place, encoder.knows_reasoning).conversations:
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
    settings: Settings, fingerprint: str, figures: numpy.ndarray, held_out: numpy.ndarray, tallies: Sequence[Tally]
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
