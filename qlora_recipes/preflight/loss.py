"""What is in the loss: the assistant's words and the token that ends them, and nothing else."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from qlora_recipes.data.encoding import IGNORED
from qlora_recipes.data.prepare import TOO_LONG, Conversation
from qlora_recipes.preflight.checks import fail_unless, passed, warn_unless
from qlora_recipes.preflight.samples import count_and_first, spread
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

_DECODED_ROWS = 200  # decoding all of 10,000 rows would take seconds
_CUT_SHARE = 0.01  # of the supervised tokens; a long row or two of a thousand are nothing to ask about


def loss_is_the_answers(run: Run) -> Check:
    """The tokens in the loss, turned back into text, are the assistant's messages: no question, no role name."""
    rows = spread(run.data.train, _DECODED_ROWS)
    wrong = [row.place for row in rows if not _supervises_answers(run, row)]
    receipt = run.data.receipt
    share = receipt.supervised_tokens / receipt.tokens
    figure = f"{receipt.supervised_tokens:,} of {receipt.tokens:,} tokens ({share:.0%}); {len(rows)} rows read back"
    return fail_unless(
        not wrong,
        f"{len(wrong)} of {len(rows)} rows have other words in the loss, {wrong[0]} first" if wrong else figure,
        "Let the template's {% generation %} block hold the answer and its end-of-turn token alone; "
        "`qlora-recipes inspect` shows each token.",
    )


def _supervises_answers(run: Run, row: Conversation) -> bool:
    supervised = [label for label in row.encoded.labels if label not in (IGNORED, run.tokenizer.eos_token_id)]
    said = "".join(message["content"] for message in row.messages if message["role"] == "assistant")
    expected = _plain_ids_as_text(run, said)
    got = _squeezed(run.tokenizer.decode(supervised))
    if row.truncated:
        return expected.startswith(got.rstrip("\ufffd"))  # the cut may fall inside a character
    return got == expected


def _plain_ids_as_text(run: Run, text: str) -> str:
    """Pass a text through the tokenizer once, since some normalize what they encode."""
    ids = run.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return _squeezed(run.tokenizer.decode(ids))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def end_of_turn(run: Run) -> Check:
    """Every answer that was not cut trains the token that ends it; without it the model never stops by itself."""
    end = run.tokenizer.eos_token_id
    wrong, first = count_and_first(
        row.place
        for row in run.data.train
        if not row.truncated and (row.encoded.labels.count(end) != _answers(row) or row.encoded.labels[-1] != end)
    )
    token = run.data.template.end_token
    return fail_unless(
        not wrong,
        f"{token} is missing in {wrong} rows, {first} first" if wrong else f"{token} in every answer",
        "Put the end-of-turn token inside the template's {% generation %} block.",
    )


def _answers(row: Conversation) -> int:
    return sum(message["role"] == "assistant" for message in row.messages)


def beginning_of_text(run: Run) -> Check:
    """Two BOS tokens in a row come from a template that writes one and a tokenizer that adds one."""
    bos, end = run.tokenizer.bos_token_id, run.tokenizer.eos_token_id
    if bos is None or bos == end:
        return passed("the family uses none")
    doubled = without = 0
    for row in run.data.train:
        ids = row.encoded.input_ids
        doubled += ids.count(bos) > 1 and (bos, bos) in pairwise(ids)
        without += ids[0] != bos
    fewest, most = run.data.template.bos_per_row
    return fail_unless(
        not doubled and not without,
        f"{doubled} rows with two in a row, {without} that start without"
        if doubled or without
        else f"{fewest} to {most} {run.tokenizer.bos_token} a row, one a turn, never two together",
        "Write {{ bos_token }} in the template once for each text, and let nothing else add it.",
    )


def rows_without_loss(run: Run) -> Check:
    """A row in which nothing is trained costs its time and teaches nothing."""
    lost = run.data.receipt.rows_dropped.get(TOO_LONG, 0)
    empty = sum(not row.encoded.supervised for row in run.data.train)
    rows = lost + len(run.data.train)
    figure = f"{lost + empty:,} of {rows:,} rows hold no answer within {run.data.receipt.max_length} tokens"
    advice = "Raise --max_length; these rows are left out."
    if empty or lost > rows / 2:
        return fail_unless(False, figure, advice)
    return warn_unless(lost <= _CUT_SHARE * rows, figure, advice)


def answers_cut(run: Run) -> Check:
    """What `max_length` takes from the answers, the end-of-turn token with it."""
    receipt = run.data.receipt
    whole = receipt.supervised_tokens + receipt.supervised_tokens_lost
    return warn_unless(
        receipt.supervised_tokens_lost <= _CUT_SHARE * whole,
        f"{receipt.answers_truncated:,} rows cut at {receipt.max_length}, "
        f"{receipt.supervised_tokens_lost:,} supervised tokens lost ({receipt.supervised_tokens_lost / whole:.1%})",
        "Raise --max_length; a cut answer has no end-of-turn token and teaches to go on.",
    )


def trainer_keeps_the_loss(run: Run) -> Check:
    """What SFTTrainer made of the rows (packed, cut, labeled) still has every token, and every label."""
    rows = run.trainer.train_dataset
    got: Counter[str] = Counter()
    for row in rows.with_format("numpy").iter(batch_size=1000):
        got["tokens"] += sum(len(ids) for ids in row["input_ids"])
        got["supervised"] += sum(int((labels != IGNORED).sum()) for labels in row["labels"])
    receipt = run.data.receipt
    holds = got["tokens"] == receipt.tokens and got["supervised"] == receipt.supervised_tokens
    into = f"{len(rows):,} packed" if run.trainer.args.packing else f"{len(rows):,}"
    return fail_unless(
        holds,
        f"{into} rows hold {got['tokens']:,} tokens and {got['supervised']:,} labels, expected {receipt.tokens:,} "
        f"and {receipt.supervised_tokens:,}"
        if not holds
        else f"all of them, in {into} rows",
        "Set --packing false, or the packing_strategy to bfd.",
    )
