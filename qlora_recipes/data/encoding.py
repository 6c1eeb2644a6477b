"""From messages to token ids and labels, such that the text of a message can never become a control token.

The template is rendered with a stand-in character for every control token it emits. The rendered text is split at
these characters; the pieces in between are encoded as plain text, whatever they spell, and the control tokens are put
back by id. For text without control strings the ids are those of the tokenizer on the whole text.

Control tokens are the special tokens of the vocabulary and what the template writes. Any other added token is a word,
and becomes its token wherever a text spells it, as in pretraining.
Knows nothing of files or models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, cast

import jinja2
import numpy
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_recipes.chat_templates import ChatTemplate
from qlora_recipes.data.sandbox import limits
from qlora_recipes.errors import TemplateError
from qlora_recipes.formatters import Message, Reason, RowError

_Tokens = tuple[list[int], list[tuple[int, int]]]
_RENDER_BYTES = 2**29
_RENDER_SECONDS = 10.0  # for one conversation, which normally takes less than a millisecond
IGNORED = -100  # the label that PyTorch's cross-entropy ignores
_CALL = {"type": "function", "function": {"name": "words", "arguments": {"words": "words"}}}
_PROBES: tuple[Sequence[Any], ...] = (
    [{"role": role, "content": "words"} for role in ("user", "assistant", "user", "assistant")],
    [{"role": role, "content": "words"} for role in ("user", "assistant")],
    [{"role": "user", "content": "words"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}],
)
"""Conversations that show how a template ends an earlier turn, the last one, and one that calls a tool."""
# Unicode's noncharacters, which text must not contain: one for each control token of a template.
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
        return len(self.labels) - self.labels.count(IGNORED)

    def cut(self, max_length: int) -> Encoded:
        """Return the first `max_length` tokens."""
        return Encoded(self.input_ids[:max_length], self.labels[:max_length])


@dataclass(frozen=True)
class Rendered:
    """One conversation as the template writes it, with a stand-in character for each control token."""

    text: str
    spans: Sequence[tuple[int, int]]
    """Where each part that is in the loss begins and ends, in characters."""


class ConversationEncoder:
    """Encodes conversations with one tokenizer and one chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        source = template.source
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        added = tokenizer.added_tokens_decoder.values()
        self.special_tokens = [token.content for token in added if token.special]
        """Tokens that text never becomes; what it spells stays text."""
        literal = [token for token in self.special_tokens if token in source]
        tokens = list(dict.fromkeys([*named.values(), *literal]))
        # A tokenizer can encode as text only what is special, so that a text with one of these is refused.
        words = (token.content for token in added if not token.special and token.content.strip())
        self.unescaped_words = [word for word in words if word in source or word in tokens]
        """Added words that the template writes: a message with one is refused."""
        if len(tokens) > len(_NONCHARACTERS):
            raise TemplateError(f"{len(tokens)} control tokens, expected at most {len(_NONCHARACTERS)}")
        marks = dict(zip(tokens, _NONCHARACTERS, strict=False))
        for token in sorted(literal, key=len, reverse=True):  # written out in the template instead of as a variable
            source = source.replace(token, marks[token])
        self._source = source
        self._marked = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        self._tokens = str.maketrans({mark: token for token, mark in marks.items()})
        self._variables: dict[str, Any] = {name: marks[token] for name, token in named.items()}
        self._ids = {mark: cast(int, tokenizer.convert_tokens_to_ids(token)) for token, mark in marks.items()}
        controls = [*tokens, *self.special_tokens, *self.unescaped_words]
        self._controls = frozenset(cast("list[int]", tokenizer.convert_tokens_to_ids(controls)))
        self._cut = re.compile("([" + "".join(marks.values()) + "])")

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Return ids and labels; the loss covers what the template generates for the assistant.

        Raises:
            RowError: when a message contains a role marker, an added word that the template writes, or one of the
                stand-in characters, or when the template itself refuses the conversation.
            TemplateError: when the template cannot be rendered.
        """
        return self.tokenize([self.render(messages)])[0]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to where the assistant's next answer starts."""
        return self.tokenize([self.render(messages, add_generation_prompt=True)])[0].input_ids

    @property
    def end_id(self) -> int:
        """The token that ends the last answer, at which generation stops; EOS where the template writes none."""
        return self._closings[0][0] if self._closings else cast(int, self.tokenizer.eos_token_id)

    @property
    def ends_turns(self) -> bool:
        """Whether the template ends an answer, in the loss, with a control token."""
        return bool(self._closings)

    @property
    def end_token(self) -> str:
        """The text of `end_id`."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end_id))

    def closes(self, labels: Sequence[int]) -> list[bool]:
        """Return, for each stretch of labels in the loss, whether it ends as the template ends a turn."""
        closings = self._closings or [(self.end_id,)]
        return [any(stretch[-len(one) :] == one for one in closings) for stretch in _stretches(labels)]

    @cached_property
    def _closings(self) -> list[tuple[int, ...]]:
        """Return what ends a turn in the loss, the last answer's first: a control token, and the white space after it.

        The token need not be EOS, the same at each turn (gpt-oss has three), or the last one (ChatML adds a newline,
        Phi-3 its EOS after the token that ends every turn).
        """
        several, one, call = map(self._probe, _PROBES)
        earlier = self._closing(several[0]) if len(several) == 2 else None
        last = self._closing((several or one or [()])[-1], prefer=earlier)
        return [closing for closing in (last, earlier, *map(self._closing, call)) if closing] if last else []

    def _probe(self, messages: Sequence[Any]) -> list[tuple[int, ...]]:
        try:
            return _stretches(self.encode(messages).labels)
        except (RowError, TemplateError):
            return []

    def _closing(self, stretch: tuple[int, ...], *, prefer: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        controls = [i for i, token in enumerate(stretch) if token in self._controls]
        at = next((i for i in reversed(controls) if prefer and stretch[i] == prefer[0]), max(controls, default=None))
        if at is None or str(self.tokenizer.decode(list(stretch[at:]), skip_special_tokens=True)).strip():
            return None
        return stretch[at:]

    def spelled(self, text: str) -> str:
        """Return a rendered text with its control tokens written out."""
        return text.translate(self._tokens)

    def control_tokens(self, ids: Iterable[int]) -> Counter[int]:
        """Return how often each control token occurs among the ids."""
        return Counter(token for token in ids if token in self._controls)

    def structure(self, roles: Sequence[str]) -> Counter[int]:
        """Return the control tokens of a conversation with these roles, which do not depend on its text."""
        return self.control_tokens(self.encode([{"role": role, "content": "words"} for role in roles]).input_ids)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
        """Return the text of a conversation: the first half of `encode`, with the same errors."""
        try:
            with limits(_RENDER_SECONDS, _RENDER_BYTES):  # the template and its role markers may be a stranger's
                self._refuse_forged(messages)
                rendered = render_jinja_template(  # in Jinja's sandbox
                    [list(messages)],
                    chat_template=self._source,
                    return_assistant_tokens_mask=self._marked,  # True would warn where there are no marks
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                )
        except RowError:
            raise
        except Exception as error:  # a template is a program and can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, jinja2.TemplateSyntaxError):
                reason += f", in line {error.lineno}"
            message = f"{self.template.name} cannot render the conversation: {reason}"
            if type(error) is jinja2.TemplateError:  # its raise_exception: what it cannot express
                raise RowError(Reason.TEMPLATE, message) from error
            raise TemplateError(message) from error
        texts, spans = cast("tuple[list[str], list[list[tuple[int, int]]]]", rendered)  # annotated as str upstream
        return Rendered(texts[0], spans[0] if spans else [])

    def _refuse_forged(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if marker := self._forged_marker(message["content"]):
                raise RowError(Reason.CONTROL_STRING, f"the {message['role']}'s text contains {marker!r}")
            if found := re.search("[\ufdd0-\ufdef]", message["content"]):
                character = f"the noncharacter {found.group()!a}"
                raise RowError(Reason.UNENCODABLE, f"the {message['role']}'s text contains {character}")

    def _forged_marker(self, text: str) -> str | None:
        """Return what a text must not contain, since it would become a part of the template, or None."""
        spelled = next((token for token in self.unescaped_words if token in text), None)
        return spelled or self.template.forged_marker(text)

    def tokenize(self, conversations: Sequence[Rendered]) -> list[Encoded]:
        """Return the ids and labels of rendered conversations; a large batch is spread over the cores."""
        pieces = [self._cut.split(rendered.text) for rendered in conversations]
        plain = [piece for parts in pieces for piece in parts if piece and piece not in self._ids]
        options = dict(add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        batch = self.tokenizer(plain, **options) if plain else {"input_ids": [], "offset_mapping": []}
        tokens = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        return [
            self._join(parts, tokens, rendered.spans) for parts, rendered in zip(pieces, conversations, strict=True)
        ]

    def _join(self, pieces: Sequence[str], tokens: Iterator[_Tokens], spans: Sequence[tuple[int, int]]) -> Encoded:
        """Return one conversation: the next tokens for each piece of text, the id for each stand-in character."""
        ids: list[int] = []
        positions: list[int] = []  # of each token's first character in the rendered text
        start = 0
        for piece in pieces:
            if piece in self._ids:
                ids.append(self._ids[piece])
                positions.append(start)
            elif piece:
                found, offsets = next(tokens)
                ids += found
                positions += [start + begin for begin, _ in offsets]
            start += len(piece)
        places = numpy.array(positions, dtype=numpy.int64)
        supervised = numpy.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            supervised |= (begin <= places) & (places < end)
        return Encoded(ids, numpy.where(supervised, ids, IGNORED).tolist())


def _stretches(labels: Sequence[int]) -> list[tuple[int, ...]]:
    """Return what is in the loss, each stretch of it by itself."""
    return [tuple(stretch) for ignored, stretch in groupby(labels, IGNORED.__eq__) if not ignored]
