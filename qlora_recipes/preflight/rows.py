"""The rows themselves: how many, how long, how often the same, and whether training has seen the held-out ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy

from qlora_recipes.data.prepare import TOO_LONG, Conversation
from qlora_recipes.formatters import Reason
from qlora_recipes.preflight.checks import fail_unless, passed, warn_unless
from qlora_recipes.preflight.samples import spread
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

_SHARED_WORDS = 8  # words in a row that two texts share by chance next to never
_HELD_OUT = 2_000  # held-out conversations looked for: their words are held in memory
_BARS = "▁▂▃▄▅▆▇█"


def rows_dropped(run: Run) -> Check:
    """Rows that could not be used, by reason; those that are too long are counted by rows_without_loss."""
    receipt = run.data.receipt
    counts = Counter({reason: count for reason, count in receipt.rows_dropped.items() if reason != TOO_LONG})
    dropped = counts.total()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    figure = f"{dropped:,} of {receipt.rows_in:,}" + (f": {reasons}" if reasons else "")
    advice = "A formatter that fits the rows loses fewer; DatasetSpec(format_row=...) names it."
    faults = sum(count for reason, count in counts.items() if reason in vars(Reason).values())
    if faults > receipt.rows_in / 2:  # a format_row of one's own may leave out as many as it likes
        return fail_unless(False, figure, advice)
    return warn_unless(dropped <= 0.01 * receipt.rows_in, figure, advice)


def row_lengths(run: Run) -> Check:
    """Tokens a row, from shortest to longest."""
    lengths = numpy.sort(numpy.fromiter((len(row.encoded.input_ids) for row in run.data.train), numpy.int64))
    return passed(f"{lengths[0]} {bars(lengths)} {lengths[-1]:,} tokens, median {lengths[len(lengths) // 2]:,}")


def bars(lengths: Sequence[int], count: int = 12) -> str:
    """Return a histogram as one word of bars, the smallest value at the left."""
    low, high = min(lengths), max(lengths) + 1
    counts = Counter((length - low) * count // (high - low) for length in lengths)
    top = max(counts.values())
    return "".join(_BARS[-(-counts[i] * (len(_BARS) - 1) // top)] for i in range(count))


def duplicates(run: Run) -> Check:
    """Conversations that are word for word another's; each copy is one more epoch of that row."""
    said = (hash(tuple(_words(message["content"]) for message in row.messages)) for row in run.data.train)
    rows = len(run.data.train)
    copies = rows - len(numpy.unique(numpy.fromiter(said, numpy.int64, rows)))
    return warn_unless(
        copies <= 0.01 * rows,
        f"{copies:,} of {rows:,} rows repeat another",
        "Take copies out of the data; they weigh as much as the rows that are there once.",
    )


def short_answers(run: Run) -> Check:
    """Answers without a word, such as `-` or `...`, teach the model to say nothing."""
    answers = empty = one = 0
    for row in run.data.train:
        for message in row.messages:
            if message["role"] == "assistant":
                answers += 1
                empty += not re.search(r"\w", message["content"])
                one += len(message["content"].split(maxsplit=1)) == 1
    return warn_unless(
        empty <= 0.001 * answers and one <= 0.2 * answers,
        f"{empty:,} of {answers:,} answers without a word, {one:,} of one word",
        "Take them out of the data, or be sure that they are what you want to hear.",
    )


def held_out_rows(run: Run) -> Check:
    """Rows kept from training; without any, a loss that falls cannot be told from learning by heart."""
    count = len(run.data.held_out)
    return warn_unless(
        count > 0, f"{count:,} of {count + len(run.data.train):,} rows", "Raise held_out in the recipe's DatasetSpec."
    )


def contamination(run: Run) -> Check:
    """Held-out answers that stand in the training rows, by eight words in a row or as a whole."""
    held_out = [set(_shingles(row)) for row in spread(run.data.held_out, _HELD_OUT)]
    expected = set().union(*held_out)
    seen: set[int] = set()
    for row in run.data.train:
        seen.update(part for part in _shingles(row) if part in expected)
    known = sum(bool(parts) and len(parts & seen) > len(parts) / 2 for parts in held_out)
    return warn_unless(
        known <= 0.05 * len(held_out),
        f"{known:,} of {len(held_out):,} held-out conversations are known from training",
        "What is measured on them is memory. Take near-copies out of the data.",
    )


def _shingles(row: Conversation) -> Iterator[int]:
    """Yield a hash of every eight words in a row of a conversation's messages, or of a shorter message as a whole."""
    for i, message in enumerate(row.messages):
        words = _words(message["content"])
        context = _words(row.messages[i - 1]["content"]) if i and len(words) < _SHARED_WORDS else ()
        words = context + words  # a short answer is known only with its question
        for start in range(max(1, len(words) - _SHARED_WORDS + 1)):
            yield hash(words[start : start + _SHARED_WORDS])


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))
