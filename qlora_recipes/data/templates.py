"""Which chat template a run is trained with, marked around what is in the loss, and the proof that the marks are right.

The order of the choice is in the README of `chat_templates/`. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_recipes.chat_templates import HERE, PLAIN_CHAT, ChatTemplate
from qlora_recipes.data.encoding import ConversationEncoder, Rendered
from qlora_recipes.errors import TemplateError
from qlora_recipes.formatters import Message, RowError
from qlora_recipes.models import MODELS, ModelSpec

_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_DAY = date(2024, 7, 26)  # which Llama 3's templates write where there is no clock
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_ROLES = ("system", "user", "assistant", "user", "assistant")
_SENTINEL = "\ue000"  # of Unicode's private use: in no text, and no template trims it
_OWN = "chat_template.jinja"  # the file of a tokenizer's own template
_ADVICE = "Give the model a ChatTemplate with {% generation %} around the answers (ModelSpec.chat_template)"


def choose_template(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the template that a run renders, with marks around the answers and the markers of its turns.

    Raises:
        TemplateError: when there is none whose marks can be proven, with the reason.
    """
    ours = spec.chat_template or {known.hub_id: known.chat_template for known in MODELS.values()}.get(spec.hub_id)
    if ours is not None:
        _render_one_turn(ConversationEncoder(tokenizer, ours))
        chosen = ours if _MARKS.search(ours.source) else mark(ours)
    else:
        chosen = _own(tokenizer)
    if chosen.role_markers is not None:
        return dated(chosen)
    return dated(replace(chosen, role_markers=_role_markers(ConversationEncoder(tokenizer, chosen))))


def dated(template: ChatTemplate) -> ChatTemplate:
    """Return a template that writes the same day every day, where it asks for today's.

    Prompts would else differ by the day, between training, evaluation and the arms of a comparison.
    """
    source = _TODAY.sub(lambda call: f"{call[1]}{_DAY.strftime(call[2])}{call[1]}", template.source)
    return template if source == template.source else replace(template, source=source, date=_DAY.isoformat())


def _own(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the first version of a tokenizer's own template whose marks are right; the plain one where it has none."""
    found = tokenizer.chat_template
    source = found.get("default") if isinstance(found, dict) else found
    if not source:
        return PLAIN_CHAT
    unmarked, reason = ChatTemplate(_MARKS.sub("", source), _OWN, origin="marked"), ""
    _render_one_turn(ConversationEncoder(tokenizer, unmarked))
    for candidate in (_from_trl(tokenizer), _with_own_marks(source), mark(unmarked)):
        if candidate is not None:
            reason = _fault_of_sentinels(tokenizer, candidate)
            if not reason:
                return candidate
    raise TemplateError(
        f"the answers cannot be marked in the tokenizer's chat template: {reason}. {_ADVICE}; "
        "qlora_recipes/chat_templates has examples"
    )


def _with_own_marks(source: str) -> ChatTemplate | None:
    return ChatTemplate(source, _OWN, origin="tokenizer") if _MARKS.search(source) else None


def _from_trl(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return TRL's training version of a template that TRL knows to the letter."""
    from trl import chat_template_utils

    try:
        source = chat_template_utils.get_training_chat_template(tokenizer)
    except Exception:  # it does not know the template, and tries it in ways that may raise anything
        return None
    files = Path(chat_template_utils.__file__).parent.glob("chat_templates/*_training.jinja")
    return next((ChatTemplate.from_file(file, origin="trl") for file in files if file.read_text() == source), None)


def mark(template: ChatTemplate) -> ChatTemplate:
    """Return a template that renders the same text, and marks what follows the generation prompt in every answer.

    It refuses a conversation in which that prompt is not what stands before the answer.
    """
    original = template.source.removesuffix("\n")  # which Jinja drops at the end of a file
    source = (HERE / "marked.jinja").read_text(encoding="utf-8").replace("ORIGINAL", original, 1)
    return replace(template, source=source)


# ---- The proof ----


def fault_of(encoder: ConversationEncoder, messages: Sequence[Message], whole: Rendered) -> str:
    """Return what is wrong with the marks of a rendered conversation that ends with an answer, by changing its texts.

    Every answer must be in the loss, and change nothing else; no other message may change what is in the loss; and the
    loss begins where the prompt ends. An empty string: nothing is wrong.
    """
    prompt = encoder.render(messages[:-1], add_generation_prompt=True).text
    inside, outside = parts(whole)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    squeezed, text, in_loss = list(map(_squeezed, answers)), _squeezed(whole.text), _squeezed("".join(inside))
    if not all(answer in text for answer in squeezed):
        return "it drops the text of an answer (as those of vision models do, which read messages made of parts)"
    if not all(answer in in_loss for answer in squeezed):
        return "an answer is not in the loss"
    others = _changed(messages, lambda role: role == "assistant")
    other_inside, other_outside = parts(encoder.render(others))
    if outside != other_outside:
        return "text outside of the loss depends on an answer"
    if inside != parts(encoder.render(_changed(messages, lambda role: role != "assistant")))[0]:
        return "text in the loss depends on more than the answers"
    if any(_has_words(_plain(after)) for after in _after_answers(others, other_inside)):
        return "words after an answer are in the loss"
    if not whole.text.startswith(prompt):  # the check `template_agrees` says so
        return ""
    begin = next((begin for begin, end in whole.spans if begin <= len(prompt) < end), None)
    if begin is None:
        return "what follows the generation prompt is not in the loss"
    # TRL has the prompt's last words in the loss with gpt-oss. Reasoning may begin in the prompt.
    if encoder.template.origin != "trl" and _has_words(_plain(whole.text[begin : len(prompt)])):
        return f"{encoder.spelled(whole.text[begin : len(prompt)])!r}, the end of the prompt, is in the loss"
    if encoder.template.origin == "marked" and prompt == encoder.render(messages[:-1]).text:
        header = whole.text[len(prompt) :].split(answers[-1].strip() or None)[0]
        if _has_words(header):
            return f"it ignores add_generation_prompt, which would put {encoder.spelled(header)!r} into the loss"
    return ""


def _after_answers(messages: Sequence[Message], inside: Sequence[str]) -> list[str]:
    """Return what is in the loss after each answer, up to the end of its part."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return [part.partition(answer)[2] for part in inside for answer in answers if answer and answer in part]


def _plain(text: str) -> str:
    """Return a rendered text without control tokens and tags, such as those of a reasoning."""
    return re.sub(r"[\ufdd0-\ufdef]|</?\w+>", "", text)


def _has_words(text: str) -> bool:
    return re.search(r"\w", text) is not None


def parts(rendered: Rendered) -> tuple[list[str], list[str]]:
    """Return the texts in the loss, and those around them."""
    edges = [0, *(edge for span in rendered.spans for edge in span), len(rendered.text)]
    pieces = [rendered.text[begin:end] for begin, end in pairwise(edges)]
    return pieces[1::2], pieces[::2]


def _changed(messages: Sequence[Message], which: Callable[[str], bool]) -> list[Message]:
    """Return the conversation with another text in each message that has one and whose role is asked for."""
    return [
        {**message, "content": f"{_SENTINEL}{i}"} if which(message["role"]) and message["content"] else message
        for i, message in enumerate(messages)
    ]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _fault_of_sentinels(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    encoder = ConversationEncoder(tokenizer, template)
    for roles in (_ROLES[1:3], _ROLES[1:], _ROLES):
        try:
            said = _sentinels(roles)
            reason = fault_of(encoder, said, encoder.render(said))
        except RowError as error:  # rows that are more than a question and an answer are then dropped, and counted
            reason = error.detail if len(roles) == 2 else ""
        if reason:
            return reason
    return "" if encoder.ends_turns else "no control token ends an answer"


def _sentinels(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": f"{role}{_SENTINEL}{i}"} for i, role in enumerate(roles)]


def _render_one_turn(encoder: ConversationEncoder) -> None:
    """Refuse a template that renders no conversation, with and without a system message.

    Raises:
        TemplateError: with the reason.
    """
    try:
        encoder.render(_sentinels(_ROLES[1:3]))
    except RowError as first:
        try:
            encoder.render(_sentinels(_ROLES[:3]))
        except RowError:
            raise TemplateError(first.detail) from first


# ---- What opens and closes turns ----


def turn_pieces(encoder: ConversationEncoder) -> list[str]:
    """Return what a template writes before and between messages, with a stand-in character for each control token."""
    for roles in (_ROLES, _ROLES[1:], _ROLES[1:3]):
        messages = _sentinels(roles)
        try:
            text = encoder.render(messages).text
        except RowError:
            continue
        pieces = re.split("|".join(re.escape(message["content"]) for message in messages), text)
        return list(dict.fromkeys(pieces[:-1]))
    return []


def _role_markers(encoder: ConversationEncoder) -> str | None:
    """Return a pattern for what opens a turn in plain text; None where every turn takes a control token.

    A piece without a control token can be written in a message. Where there is one, the plain text of the others is
    refused as well, since a model may read the template's words without their control tokens.
    """
    controls = re.compile("|".join(["[\ufdd0-\ufdef]", *map(re.escape, encoder.unescaped_words)]))
    pieces = [piece for piece in turn_pieces(encoder) if piece.strip()]
    if all(controls.search(piece) for piece in pieces):
        return None
    parts_of_pieces = [part for piece in pieces for part in controls.split(piece)]
    found = dict.fromkeys(marker for part in parts_of_pieces for marker in _markers(part, first=part == pieces[0]))
    return "|".join(found)


def _markers(part: str, *, first: bool) -> Iterator[str]:
    """Yield a pattern for each line of a piece that has words and something else, as `[INST]` or `User:`."""
    for i, line in enumerate(part.split("\n")):
        if _has_words(line) and re.search(r"[^\w\s]", line):
            yield (r"(?m:^[ \t]*)" if i or first else "") + re.escape(line.strip())
