"""Training, chat and evaluation render one and the same text, to the token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_recipes.data.encoding import IGNORED
from qlora_recipes.data.prepare import Conversation
from qlora_recipes.preflight.checks import fail_unless, passed
from qlora_recipes.preflight.samples import spread_where
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 50


def template_agrees(run: Run) -> Check:
    """The prompt that chat and lm-eval build is, token for token, what stood before the answer in training."""
    tokens = run.tokenizer.all_special_tokens
    rows = spread_where(run.data.train, lambda row: not row.truncated and not _holds(tokens, row), _ROWS)
    wrong = [row.place for row in rows if not _prompt_agrees(run, row)]
    return fail_unless(
        not wrong and run.tokenizer.chat_template == run.encoder.template.source,
        f"{len(wrong)} of {len(rows)} prompts differ from training, {wrong[0]} first"
        if wrong
        else f"{len(rows)} prompts, sha256 {run.data.template.sha256[:12]}",
        "Let add_generation_prompt render exactly what stands before {% generation %} in training.",
    )


def _holds(tokens: Sequence[str], row: Conversation) -> bool:
    """Whether a control token stands in a row; it is encoded as text, which no tokenizer does: see forged_turns."""
    return any(token in message["content"] for message in row.messages for token in tokens)


def _prompt_agrees(run: Run, row: Conversation) -> bool:
    before = row.messages[:-1]
    prompt = run.encoder.encode_prompt(before)
    trained = row.encoded
    starts_there = trained.input_ids[: len(prompt)] == prompt and all(
        label != IGNORED for label in trained.labels[len(prompt) :]
    )
    # lm-eval and chat render to text and encode it, with no BOS added where the text starts with one
    text = run.tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    whole = run.tokenizer.apply_chat_template(row.messages, tokenize=False)
    return (
        starts_there
        and _plain(run.tokenizer, text) == prompt
        and _plain(run.tokenizer, whole) == trained.input_ids
        and whole.startswith(text)
    )


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spaces_as_pretrained(run: Run) -> Check:
    """Where a space and a word make a piece, two spaces and a word are a space and that piece."""
    if not run.settings.spec.spaces_merge_last:
        return passed("nothing known of this vocabulary")
    pieces = run.tokenizer.tokenize("a  b")[-2:]
    space, word = run.tokenizer.tokenize(" ")[0], run.tokenizer.tokenize("a b")[-1]
    return fail_unless(
        word == "b" or pieces == [space[:1], word],
        f"two spaces before a word are {' '.join(pieces)!r}",
        "This tokenizer.json was converted by Transformers 5, and repairs.merge_spaces_last did not mend it.",
    )


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of a tokenizer's chat template as receipts hold it."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
