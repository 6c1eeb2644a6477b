"""What is in the loss: the assistant's words and the token that ends them, nothing else.

Changes nothing of the run.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import numpy

from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.data.encoding import IGNORED
from qlora_recipes.data.prepare import TOO_LONG
from qlora_recipes.data.templates import fault_of
from qlora_recipes.formatters import TEXT
from qlora_recipes.preflight.checks import fail_unless, passed, warn_unless
from qlora_recipes.preflight.rows import count_and_first, spread
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

if TYPE_CHECKING:
    from datasets import Dataset

_DECODED_ROWS = 200  # decoding all of 10,000 rows would take seconds
_CUT_SHARE = 0.01  # of the supervised tokens; one or two long rows in a thousand are harmless


def loss_is_the_answers(run: Run) -> Check:
    """The tokens in the loss are the assistant's messages, no question and no role name; shown by changing messages."""
    rows, faults = spread(run.data.train, _DECODED_ROWS), []
    for row in rows:
        with run.encoder.limited():  # it is rendered eight times
            if fault := _fault(run, row):
                faults.append((row.place, fault))
    receipt = run.data.receipt
    share = receipt.supervised_tokens / receipt.tokens
    figure = f"{receipt.supervised_tokens:,} of {receipt.tokens:,} tokens ({share:.0%}); {len(rows)} rows read back"
    return fail_unless(
        not faults,
        f"{len(faults)} of {len(rows)} rows have other words in the loss, {faults[0][0]} first: {faults[0][1]}"
        if faults
        else figure,
        "Put the answer and its end-of-turn token, nothing else, in the template's {% generation %} block; "
        "`qlora-recipes inspect` shows each token.",
    )


def _fault(run: Run, row: Conversation) -> str:
    """Return what is wrong with the loss of a row: the template's marks, or tokens that are not what it marks."""
    encoder, controls = run.encoder, run.encoder.control_tokens(row.encoded.input_ids)
    if row.messages[0]["role"] == TEXT:  # the first token has nothing before it
        return "" if row.encoded.labels[1:] == row.encoded.input_ids[1:] else "a part of the text is not in the loss"
    whole = encoder.render(row.messages, row.tools)
    words = re.sub("[\ufdd0-\ufdef]", "", whole.in_loss)
    for control in encoder.unescaped_words:
        words = words.replace(control, "")
    got = _as_text(run, [label for label in row.encoded.labels if label != IGNORED and label not in controls])
    # else encoded and decoded again, since some tokenizers normalize what they encode
    if not _agrees(row, got, "".join(words.split())) and not _agrees(
        row, got, _as_text(run, run.tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    ):
        return "the tokens in the loss are not what the template marks"
    if misplaced := encoder.fate(row.messages, row.tools).misplaced:
        return f"{misplaced[0]} is on the wrong side of a mark"
    plain = row.tools is None and all(len(message) == 2 for message in row.messages)
    return fault_of(encoder, row.messages, whole) if plain else ""


def _agrees(row: Conversation, got: str, expected: str) -> bool:
    return expected.startswith(got.rstrip("\ufffd")) if row.truncated else got == expected  # cut inside a character


def _as_text(run: Run, ids: list[int]) -> str:
    """Decode ids, without any white space."""
    return "".join(cast(str, run.tokenizer.decode(numpy.array(ids, int))).split())  # of a list it checks each


def end_of_turn(run: Run) -> Check:
    """Every whole answer trains the token that ends it; without this the model never stops by itself."""
    figures, token = run.data.figures, run.data.template.end_token
    ended = (figures["ends"] == figures["answers"]) & figures["last_is_end"]
    wrong, first = count_and_first(run.data.train, ~figures["truncated"] & ~ended)
    return fail_unless(
        not wrong,
        f"{token} is missing in {wrong} rows, {first} first" if wrong else f"{token} in every answer",
        "Put the end-of-turn token inside the template's {% generation %} block.",
    )


def beginning_of_text(run: Run) -> Check:
    """Two BOS tokens in a row come from a template that writes one and a tokenizer that adds one."""
    bos, ends = run.tokenizer.bos_token_id, (run.tokenizer.eos_token_id, run.encoder.end_id)
    if bos is None or bos in ends:
        return passed("the family uses none")
    doubled, without = run.data.figures["doubled_bos"].sum(), (~run.data.figures["starts_with_bos"]).sum()
    fewest, most = run.data.template.bos_per_row
    if most == 0 and run.encoder.template.origin in ("tokenizer", "trl", "marked"):
        return passed("the model's own template writes none")  # as that of gpt-oss
    return fail_unless(
        not doubled and not without,
        f"{doubled} rows with two in a row, {without} that start without"
        if doubled or without
        else f"{fewest} to {most} {run.tokenizer.bos_token} a row, one a turn, never two together",
        "Write {{ bos_token }} in the template once per text, and let nothing else add it.",
    )


def rows_without_loss(run: Run) -> Check:
    """A row without a token in the loss costs time and teaches nothing."""
    lost = run.data.receipt.rows_dropped.get(TOO_LONG, 0)
    empty = int((run.data.figures["supervised"] == 0).sum())
    rows = lost + len(run.data.train)
    figure = f"{lost + empty:,} of {rows:,} rows have no answer within {run.data.receipt.max_length} tokens"
    advice = "Raise --max_length; these rows are left out."
    if empty or lost > rows / 2:
        return fail_unless(False, figure, advice)
    return warn_unless(lost <= _CUT_SHARE * rows, figure, advice)


def answers_cut(run: Run) -> Check:
    """Tokens of the answers beyond `max_length`; the end-of-turn token is among them."""
    receipt = run.data.receipt
    whole = receipt.supervised_tokens + receipt.supervised_tokens_lost
    return warn_unless(
        receipt.supervised_tokens_lost <= _CUT_SHARE * whole,
        f"{receipt.answers_truncated:,} rows cut at {receipt.max_length}, "
        f"{receipt.supervised_tokens_lost:,} supervised tokens lost ({receipt.supervised_tokens_lost / whole:.1%})",
        "Raise --max_length; a truncated answer has no end-of-turn token, so the model learns not to stop.",
    )


def trainer_keeps_the_loss(run: Run) -> Check:
    """What TRL's trainer made of the rows (packed, truncated, labeled) still has every token and every label."""
    rows = cast("Dataset", run.trainer.train_dataset)
    tokens = supervised = 0
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        columns = cast("dict[str, Any]", batch)
        if run.settings.of_preferences:
            supervised += (chosen := sum(len(ids) for ids in columns["chosen_ids"]))
            tokens += chosen + sum(len(ids) for ids in columns["prompt_ids"])
            continue
        tokens += sum(len(ids) for ids in columns["input_ids"])
        supervised += sum(int((labels != IGNORED).sum()) for labels in columns["labels"])
    receipt = run.data.receipt
    into = f"{len(rows):,} packed rows" if getattr(run.trainer.args, "packing", False) else f"{len(rows):,} rows"
    holds = (tokens, supervised) == (receipt.tokens, receipt.supervised_tokens)
    expected = f"expected {receipt.tokens:,} and {receipt.supervised_tokens:,}"
    return fail_unless(
        holds,
        f"all of them, in {into}" if holds else f"{into} have {tokens:,} tokens and {supervised:,} labels, {expected}",
        "Set --packing false, or --packing_strategy bfd.",
    )
