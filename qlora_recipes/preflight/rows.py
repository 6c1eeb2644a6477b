"""The rows themselves: how many, how long, how often repeated, and whether training has seen the held-out ones.

Needs no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy

from qlora_recipes.data.arrow_rows import Conversation, passages
from qlora_recipes.data.prepare import TOO_LONG
from qlora_recipes.formatters import Reason
from qlora_recipes.preflight.checks import fail_unless, passed, warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

_HELD_OUT = 2_000  # held-out conversations to look for, since hashes of all their words are in memory
_LAST_BITS = 2**24 - 1
_FEW_HELD_OUT = 20  # below, a comparison says nothing of their answers
_COLUMNS = 12  # named; all of them are in the receipt
_BARS = "▁▂▃▄▅▆▇█"
Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int, where: numpy.ndarray | None = None) -> list[Item]:
    """Return at most `count` items at even distances, the first and the last included; nothing is random.

    With `where`, one bool for each item, only items for which it is true are returned.
    """
    places = numpy.arange(len(items)) if where is None else numpy.flatnonzero(where)
    if len(places) > count:
        places = places[[round(i * (len(places) - 1) / (count - 1)) for i in range(count)]]
    return [items[int(place)] for place in places]


def count_and_first(rows: Sequence[Conversation], chosen: numpy.ndarray) -> tuple[int, str]:
    """Return how many rows are chosen, and the place of the first of them."""
    count = int(chosen.sum())
    return count, rows[int(chosen.argmax())].place if count else ""


def rows_dropped(run: Run) -> Check:
    """Count rows that could not be used, by reason; rows_without_loss counts those that are too long."""
    receipt = run.data.receipt
    counts = Counter({reason: count for reason, count in receipt.rows_dropped.items() if reason != TOO_LONG})
    dropped = counts.total()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    figure = f"{dropped:,} of {receipt.rows_in:,}" + (f": {reasons}" if reasons else "")
    advice = "Name a formatter that fits the rows: DatasetSpec(format_row=...)."
    faults = sum(count for reason, count in counts.items() if reason in vars(Reason).values())
    if faults > receipt.rows_in / 2:  # your own format_row may leave out as many as it likes
        return fail_unless(False, figure, advice)
    return warn_unless(dropped <= 0.01 * receipt.rows_in, figure, advice)


def columns_unread(run: Run) -> Check:
    """Columns, and keys of message objects, that the formatter reads in no row: nothing of them is trained on."""
    unread = [f"{name} ({count:,})" for name, count in run.data.receipt.columns_unread.items()]
    shown = ", ".join(unread[:_COLUMNS]) + (f" and {len(unread) - _COLUMNS} more" if len(unread) > _COLUMNS else "")
    return warn_unless(
        not unread,
        f"left out of training: {shown}" if unread else "every column is read",
        "Read them in your own format_row if the model should learn from them, or remove them from the data.",
    )


def row_lengths(run: Run) -> Check:
    """Show the number of tokens per row, from shortest to longest."""
    lengths = sorted(run.data.figures["length"].tolist())
    return passed(f"{lengths[0]} {bars(lengths)} {lengths[-1]:,} tokens, median {lengths[len(lengths) // 2]:,}")


def bars(lengths: Sequence[int], count: int = 12) -> str:
    """Return a histogram as one word of bars, the smallest value at the left."""
    low, high = min(lengths), max(lengths) + 1
    counts = Counter((length - low) * count // (high - low) for length in lengths)
    top = max(counts.values())
    return "".join(_BARS[-(-counts[i] * (len(_BARS) - 1) // top)] for i in range(count))


def duplicates(run: Run) -> Check:
    """Conversations with the same words as another; each copy is one more epoch of that row."""
    rows = len(run.data.train)
    copies = rows - len(numpy.unique(run.data.figures["words"]))
    return warn_unless(
        copies <= 0.01 * rows,
        f"{copies:,} of {rows:,} rows repeat another",
        "Remove duplicates: a row that appears twice counts twice in training.",
    )


def short_answers(run: Run) -> Check:
    """Answers without a word, such as `-` or `...`, teach the model to say nothing."""
    names = ("answers", "wordless_answers", "one_word_answers")
    answers, empty, one = (int(run.data.figures[name].sum()) for name in names)
    return warn_unless(
        empty <= 0.001 * answers and one <= 0.2 * answers,
        f"{empty:,} of {answers:,} answers without a word, {one:,} of one word",
        "Remove them from the data, unless such answers are what you want.",
    )


def held_out_rows(run: Run) -> Check:
    """Without rows kept from training a falling loss may be memorization, and few of them cannot be compared."""
    count = len(run.data.held_out)
    return warn_unless(
        count >= _FEW_HELD_OUT,
        f"{count:,} of {count + len(run.data.train):,} rows",
        f"To compare their answers takes {_FEW_HELD_OUT}: raise held_out in the recipe's DatasetSpec.",
    )


def contamination(run: Run) -> Check:
    """Count held-out conversations that training contains, by eight consecutive words or by whole short messages."""
    chosen = set(spread(range(len(run.data.held_out)), _HELD_OUT))
    every = (part for batch in passages(run.data.held_out) for part in batch.split())
    held_out = [numpy.unique(part) for i, part in enumerate(every) if i in chosen]
    expected = numpy.unique(numpy.concatenate([*held_out, numpy.empty(0, numpy.int64)]))
    seen, unseen = numpy.zeros(len(expected), dtype=bool), numpy.zeros(_LAST_BITS + 1, numpy.uint8)
    numpy.add.at(unseen, expected & _LAST_BITS, 1)  # rules out most passages at once
    for batch in passages(run.data.train):
        found = numpy.sort(batch.values[unseen[batch.values & _LAST_BITS] > 0])  # in order, it is looked up sooner
        places = numpy.searchsorted(expected, found)
        places[places == len(expected)] = 0
        new = numpy.unique(places[expected[places] == found])
        new = new[~seen[new]]
        seen[new] = True
        numpy.subtract.at(unseen, expected[new] & _LAST_BITS, 1)
    known = sum(seen[numpy.searchsorted(expected, part)].mean() > 0.5 for part in held_out)
    return warn_unless(
        known <= 0.05 * len(held_out),
        f"{known:,} of {len(held_out):,} held-out conversations are known from training",
        "Scores on them measure memory. Remove near-copies from the data.",
    )
