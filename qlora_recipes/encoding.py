"""From messages to token ids and labels, such that the text of a message can never become a control token.

The template is rendered with a stand-in character for every control token it emits. The rendered text is cut at
these; what lies between is encoded as plain text, whatever it spells, and the control tokens are put back by id.
For text without control strings the ids are those of the tokenizer on the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.utils.chat_template_utils import render_jinja_template

from qlora_recipes.chat_templates import ChatTemplate
from qlora_recipes.errors import TemplateError
from qlora_recipes.formatters import Message, Reason, RowError
from qlora_recipes.time_limit import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RENDER_SECONDS = 10.0  # of one conversation, which takes less than a millisecond
IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
# Unicode's noncharacters, which no text may hold: one for each control token of a template.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class Encoded:
    """One conversation as the model sees it."""

    input_ids: list[int]
    labels: list[int]
    """The id where the token is in the loss, -100 elsewhere; as long as `input_ids`."""

    @property
    def supervised(self) -> int:
        """Number of tokens in the loss."""
        return sum(label != IGNORED for label in self.labels)

    def cut(self, max_length: int) -> Encoded:
        """Return the first `max_length` tokens."""
        return Encoded(self.input_ids[:max_length], self.labels[:max_length])


class ConversationEncoder:
    """Encodes conversations with one tokenizer and one chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        source = template.source
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        literal = [token for token in tokenizer.all_special_tokens if token in source]
        tokens = list(dict.fromkeys([*named.values(), *literal]))
        if len(tokens) > len(_NONCHARACTERS):
            raise TemplateError(f"{len(tokens)} control tokens, wanted at most {len(_NONCHARACTERS)}")
        marks = dict(zip(tokens, _NONCHARACTERS, strict=False))
        for token in sorted(literal, key=len, reverse=True):  # written out in the template instead of as a variable
            source = source.replace(token, marks[token])
        self._source = source
        self._variables = {name: marks[token] for name, token in named.items()}
        self._ids = {mark: tokenizer.convert_tokens_to_ids(token) for token, mark in marks.items()}
        self._cut = re.compile("([" + "".join(marks.values()) + "])")

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Return ids and labels; the loss covers what the template generates for the assistant.

        Raises:
            RowError: when a message holds a role marker or a character that stands for a control token.
            TemplateError: when the template cannot be rendered.
        """
        self._check(messages)
        text, spans = self._render(messages, add_generation_prompt=False)
        return self._tokenize(text, spans)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids after which the assistant's answer is to be generated."""
        self._check(messages)
        text, _ = self._render(messages, add_generation_prompt=True)
        return self._tokenize(text, []).input_ids

    def _check(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if marker := self.template.forged_marker(message["content"]):
                raise RowError(Reason.CONTROL_STRING, f"the {message['role']}'s text holds {marker!r}")
            if found := re.search("[\ufdd0-\ufdef]", message["content"]):
                raise RowError(
                    Reason.UNENCODABLE, f"the {message['role']}'s text holds the noncharacter {found.group()!a}"
                )

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            with time_limit(_RENDER_SECONDS):
                texts, spans = render_jinja_template(  # in Jinja's sandbox
                    [list(messages)],
                    chat_template=self._source,
                    return_assistant_tokens_mask=True,
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                )
        except Exception as error:  # a template is a program, and fails as programs do
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TemplateError(f"{self.template.path.name} cannot render the conversation: {reason}") from error
        return texts[0], spans[0]

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> Encoded:
        pieces = self._cut.split(text)
        starts = [0]
        for piece in pieces:
            starts.append(starts[-1] + len(piece))
        plain = [piece for piece in pieces if piece and piece not in self._ids]
        encoded = iter(self._plain_tokens(plain))
        ids: list[int] = []
        positions: list[int] = []  # of each token's first character in the rendered text
        for piece, start in zip(pieces, starts, strict=False):
            if piece in self._ids:
                ids.append(self._ids[piece])
                positions.append(start)
            elif piece:
                for token, offset in next(encoded):
                    ids.append(token)
                    positions.append(start + offset)
        labels = [
            token if any(begin <= position < end for begin, end in spans) else IGNORED
            for token, position in zip(ids, positions, strict=True)
        ]
        return Encoded(ids, labels)

    def _plain_tokens(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """Return, for each text, its tokens as (id, offset of the first character), no string being special."""
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return [
            [(token, begin) for token, (begin, _) in zip(ids, offsets, strict=True)]
            for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ]
