"""Training, chat and evaluation render the same prompt, to the token, and no text in a message can open a turn.

Control tokens in a text are encoded as the characters they are written with. A role marker is plain text to every
tokenizer, so a message that contains one is dropped. Both are proven here with the tokenizer of the run.
Needs no model.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.data.encoding import IGNORED, ConversationEncoder
from qlora_recipes.data.templates import turn_pieces
from qlora_recipes.formatters import Message, Reason, RowError, Tools, before_last_answer
from qlora_recipes.preflight.checks import fail_unless, passed
from qlora_recipes.preflight.rows import count_and_first, spread
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 50


def template_agrees(run: Run) -> Check:
    """The prompt that chat and lm-eval build is, token for token, what came before the answer in training."""
    # a control token in a row is encoded as text, which no tokenizer does by itself: see forged_turns
    figures = run.data.figures
    rows = spread(run.data.train, _ROWS, ~figures["truncated"] & ~figures["control_text"])
    rows = [row for row in rows if before_last_answer(row.messages)]  # a plain text has no prompt
    wrong = [row for row in rows if not _prompt_agrees(run, row)]
    advice = "Let add_generation_prompt render exactly what comes before {% generation %} in training."
    if wrong and _opens_reasoning(run, wrong[0]):
        advice = "The prompt opens the reasoning, and the rows have none: give rows with it, or a template of your own."
    return fail_unless(
        not wrong and run.tokenizer.chat_template == run.encoder.template.source,
        f"{len(wrong)} of {len(rows)} prompts differ from training, {wrong[0].place} first"
        if wrong
        else f"{len(rows)} prompts, {run.data.template.name} ({run.data.template.origin}), "
        f"sha256 {run.data.template.sha256[:12]}",
        advice,
    )


def _opens_reasoning(run: Run, row: Conversation) -> bool:
    prompt = run.encoder.render(before_last_answer(row.messages), row.tools, add_generation_prompt=True)
    return prompt.text.rstrip().endswith("<think>")


def _prompt_agrees(run: Run, row: Conversation) -> bool:
    before, trained = before_last_answer(row.messages), row.encoded
    prompt = run.encoder.encode_prompt(before, row.tools)
    # lm-eval and chat render to text and encode it; no BOS is added where the text starts with one
    text = _rendered(run, before, row.tools, add_generation_prompt=True)
    whole = _rendered(run, row.messages, row.tools)
    is_last = len(before) == len(row.messages) - 1  # turns that are not trained may follow
    return (
        trained.input_ids[: len(prompt)] == prompt
        and _all_until_the_end(trained.labels[len(prompt) :], is_last)
        and _ids(run, text) == prompt
        and _ids(run, whole) == trained.input_ids
        and whole.startswith(text)
    )


def _all_until_the_end(labels: Sequence[int], is_last: bool) -> bool:
    """Whether the answer that follows the prompt is in the loss; white space after its end-of-turn token need not be.

    Where it is the last message, nothing after it is in the loss either.
    """
    inside = [label != IGNORED for label in labels]
    return True in inside and (not is_last or inside == sorted(inside, reverse=True))


def _rendered(
    run: Run, messages: Sequence[Message], tools: Tools | None = None, *, add_generation_prompt: bool = False
) -> str:
    text = run.tokenizer.apply_chat_template(
        run.encoder.for_template(messages),
        tools=cast(Any, tools),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return cast(str, text)


def _ids(run: Run, text: str) -> list[int]:
    return cast("list[int]", run.tokenizer(text, add_special_tokens=False)["input_ids"])


def spaces_as_pretrained(run: Run) -> Check:
    """Where a space and a word make one piece, two spaces and a word are a space and that piece."""
    if not run.settings.spec.spaces_merge_last:
        return passed("nothing known of this vocabulary")
    pieces = run.tokenizer.tokenize("a  b")[-2:]
    space, word = run.tokenizer.tokenize(" ")[0], run.tokenizer.tokenize("a b")[-1]
    return fail_unless(
        word == "b" or pieces == [space[:1], word],
        f"two spaces before a word are {' '.join(pieces)!r}",
        "This tokenizer.json was converted by Transformers 5, and repairs.merge_spaces_last did not fix it.",
    )


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of a tokenizer's chat template as receipts record it."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()


def forged_turns(run: Run) -> Check:
    """Put every control token and every piece of the template itself into a message, and look for a new turn."""
    encoder = run.encoder
    added = [token for token in run.tokenizer.get_added_vocab() if token.strip()]
    first, *others = [encoder.spelled(piece) for piece in turn_pieces(encoder)]
    pieces = [f"words\n{first}words", *(f"words{piece}words" for piece in others)]
    pieces = [piece for piece in pieces if piece.split() != ["words", "words"]]  # white space opens no turn
    tokens = [f"words {token} words" for token in added]
    refused, harmless = None, _controls(encoder, "words")
    forged = [text for text in tokens if _controls(encoder, text) not in (refused, harmless)]
    # Where every piece contains a control token (as in ChatML), a turn cannot open without one. Where some are plain
    # text, every piece must be refused.
    some_plain = any(not any(token in piece for token in added) for piece in pieces)
    allowed = (refused,) if some_plain else (refused, harmless)
    forged += [piece for piece in pieces if _controls(encoder, piece) not in allowed]
    as_text = run.data.figures["control_text"].sum()
    dropped = run.data.receipt.rows_dropped.get(Reason.CONTROL_STRING, 0)
    return fail_unless(
        not forged,
        f"a message with {forged[0]!r} opens a turn or holds a control token"
        if forged
        else f"0 of {len(tokens) + len(pieces)} tries; {as_text} rows hold control tokens as text, {dropped} dropped",
        "Add what is plain text in the template to role_markers of its ChatTemplate.",
    )


def _controls(encoder: ConversationEncoder, question: str) -> Counter[int] | None:
    """Return the control tokens of a conversation with this question; None where it is refused."""
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": "words"}]
    try:
        return encoder.control_tokens(encoder.encode(said).input_ids)
    except RowError:
        return None


def control_tokens(run: Run) -> Check:
    """Every row has the control tokens that its turns need, and no other."""
    data = run.data
    trained, first = count_and_first(data.train, ~data.figures["controls_fit"])
    held_out, second = count_and_first(data.held_out, ~data.held_out_figures["controls_fit"])
    wrong, rows = trained + held_out, len(data.train) + len(data.held_out)
    return fail_unless(
        not wrong,
        f"{wrong} rows hold others, {first or second} first" if wrong else f"as many as turns in {rows:,} rows",
        "Text in a message became a control token; `qlora-recipes inspect` shows it. Report this as a bug.",
    )
