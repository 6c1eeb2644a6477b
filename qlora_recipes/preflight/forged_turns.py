"""No words of a message can become a control token or open a turn.

Control tokens in a text are encoded as the characters that they are written with; a text with a role marker, which is
plain characters to every tokenizer, is dropped. Both are proven here with the tokenizer of the run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence, Set
from functools import cache
from itertools import chain

from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.prepare import Conversation
from qlora_recipes.formatters import Message, Reason, RowError
from qlora_recipes.preflight.checks import fail_unless
from qlora_recipes.preflight.samples import count_and_first
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

_ROLES = ("system", "user", "assistant", "user", "assistant")


def forged_turns(run: Run) -> Check:
    """Put every control token and every piece of the template itself into a message, and look for a new turn."""
    tokens = [f"words {token} words" for token in run.tokenizer.get_added_vocab() if token.strip()]
    pieces = _template_pieces(run)
    forged = [text for text in tokens if _changes_structure(run.encoder, text)] + _forging(run, pieces)
    special = run.tokenizer.all_special_tokens
    as_text = sum(_holds(special, row.messages) for row in run.data.train)
    dropped = run.data.receipt.rows_dropped.get(Reason.CONTROL_STRING, 0)
    return fail_unless(
        not forged,
        f"a message with {forged[0]!r} opens a turn or holds a control token"
        if forged
        else f"0 of {len(tokens) + len(pieces)} tries; {as_text} rows hold control tokens as text, {dropped} dropped",
        "Add what is plain text in the template to role_markers of its ChatTemplate.",
    )


def _template_pieces(run: Run) -> list[str]:
    """Return what the template writes between messages, as words of a message."""
    contents = [f"{role}\ue000{i}" for i, role in enumerate(_ROLES)]
    messages = [{"role": role, "content": content} for role, content in zip(_ROLES, contents, strict=True)]
    text = run.tokenizer.apply_chat_template(messages, tokenize=False)
    first, *others = re.split("|".join(contents), text)
    return [f"words\n{first}words", *(f"words{piece}words" for piece in dict.fromkeys(others[:-1]))]


def _forging(run: Run, pieces: list[str]) -> list[str]:
    """Return the pieces that open a turn in a message.

    Where every piece holds a control token (as in ChatML), a turn cannot open without one. Where some are plain text,
    every piece must be refused.
    """
    tokens = [token for token in run.tokenizer.get_added_vocab() if token.strip()]
    plain = any(not any(token in piece for token in tokens) for piece in pieces)
    forges = _is_taken if plain else _changes_structure
    return [piece for piece in pieces if forges(run.encoder, piece)]


def _is_taken(encoder: ConversationEncoder, text: str) -> bool:
    try:
        encoder.encode(_question(text))
    except RowError:
        return False
    return True


def _changes_structure(encoder: ConversationEncoder, text: str) -> bool:
    """Whether a question of this text is taken and makes other control tokens than plain words do."""
    try:
        ids = encoder.encode(_question(text)).input_ids
    except RowError:
        return False
    return _controls(encoder, ids) != structure(encoder, ("user", "assistant"))


def _question(text: str) -> list[Message]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "words"}]


def _holds(tokens: Sequence[str], messages: Sequence[Message]) -> bool:
    return any(token in message["content"] for message in messages for token in tokens)


def control_tokens(run: Run) -> Check:
    """Every row holds the control tokens that its turns need, and no other."""
    added = set(run.tokenizer.get_added_vocab().values())
    expected = cache(lambda roles: structure(run.encoder, roles))
    wrong, first = count_and_first(
        row.place
        for row in chain(run.data.train, run.data.held_out)
        if not _as_wanted(row, expected(tuple(message["role"] for message in row.messages)), added)
    )
    rows = len(run.data.train) + len(run.data.held_out)
    return fail_unless(
        not wrong,
        f"{wrong} rows hold others, {first} first" if wrong else f"as many as turns in {rows:,} rows",
        "A message's words became a control token; `qlora-recipes inspect` shows it. Report this as a bug.",
    )


def _as_wanted(row: Conversation, expected: Counter[int], added: Set[int]) -> bool:
    found = Counter(token for token in row.encoded.input_ids if token in added)
    return found <= expected if row.truncated else found == expected


def structure(encoder: ConversationEncoder, roles: Sequence[str]) -> Counter[int]:
    """Return how often each control token stands in a conversation of these roles, whatever its words."""
    return _controls(encoder, encoder.encode([{"role": role, "content": "words"} for role in roles]).input_ids)


def _controls(encoder: ConversationEncoder, ids: Sequence[int]) -> Counter[int]:
    added = set(encoder.tokenizer.get_added_vocab().values())
    return Counter(token for token in ids if token in added)
