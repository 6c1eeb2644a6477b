"""Where an answer begins in a template's turn, and where the reasoning before it ends, found by rendering words."""

from __future__ import annotations

from qlora_recipes.data.encoding import ConversationEncoder, Rendered
from qlora_recipes.errors import TemplateError
from qlora_recipes.formatters import RowError

_ASKED = {"role": "user", "content": "question"}
_ANSWERED = {"role": "assistant", "content": "\ue000answer", "reasoning_content": "\ue000reasoning"}


def answer_start(encoder: ConversationEncoder) -> str | None:
    """Return what training has between the prompt and an answer without reasoning, such as a space.

    None where the prompt of a question is not how the turn begins.
    """
    answered = {"role": "assistant", "content": _ANSWERED["content"]}
    try:
        prompt, whole = (
            encoder.render([_ASKED], add_generation_prompt=True).text,
            encoder.render([_ASKED, answered]).text,
        )
    except (RowError, TemplateError):
        return None
    if not whole.startswith(prompt):
        return None
    return encoder.spelled(whole[len(prompt) :].partition(_ANSWERED["content"])[0])


def reasoning_end(encoder: ConversationEncoder) -> int | None:
    """Return the last control token between reasoning and answer, such as `</think>`; None where there is none."""
    try:
        text = encoder.render([_ASKED, _ANSWERED]).text
    except (RowError, TemplateError):
        return None
    _, found, after = text.partition(_ANSWERED["reasoning_content"])
    between = after.partition(_ANSWERED["content"])[0] if found else ""
    ids = encoder.tokenize([Rendered(between, [])])[0].input_ids
    return next((token for token in reversed(ids) if encoder.control_tokens([token])), None)


def without_reasoning(ids: list[int], end: int | None) -> list[int]:
    """Return what follows the last reasoning of an answer; all of it where none ended."""
    return ids[len(ids) - ids[::-1].index(end) :] if end in ids else ids
