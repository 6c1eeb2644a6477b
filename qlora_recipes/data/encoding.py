"""From messages to token ids and labels, such that the text of a message can never become a control token.

The template is rendered with a stand-in character for every control token it emits. The rendered text is split at
these characters; the pieces in between are encoded as plain text, whatever they spell, and the control tokens are put
back by id. For text without control strings the ids are those of the tokenizer on the whole text.

Control tokens are the special tokens of the vocabulary and what the template writes. Any other added token is a word,
and becomes its token wherever a text spells it, as in pretraining. A plain text needs no template.
Knows nothing of files or models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, groupby, islice
from typing import Any, NamedTuple, cast

import jinja2
import numpy
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_recipes.chat_templates import KEEP_TEXTS, ChatTemplate
from qlora_recipes.data.encoded import IGNORED as IGNORED
from qlora_recipes.data.encoded import Encoded as Encoded
from qlora_recipes.data.encoded import EncodedBatch
from qlora_recipes.data.outline import Fate, Pattern, outline, shape_of
from qlora_recipes.data.plain_text import PlainEncoder, Tokens, inside_a_text
from qlora_recipes.data.ragged import Ragged
from qlora_recipes.data.sandbox import limits
from qlora_recipes.errors import TemplateError
from qlora_recipes.formatters import (
    TEXT,
    Message,
    Reason,
    RowError,
    Tools,
    inner_thought,
    is_trained,
    strings,
    words_of,
)

_RENDER_BYTES = 2**29
_RENDER_SECONDS = 10.0  # for one conversation, which normally takes less than a millisecond
_TRUSTED = ("recipe", "package", "plain", "trl")
_SHAPES = 4096  # of conversations, for each of which the template is tried once
_CALL = {"type": "function", "function": {"name": "words", "arguments": {"words": "words"}}}
_PROBES: tuple[Sequence[Any], ...] = (
    [{"role": role, "content": "words"} for role in ("user", "assistant", "user", "assistant")],
    [{"role": role, "content": "words"} for role in ("user", "assistant")],
    [{"role": "user", "content": "words"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}],
)
"""Conversations that show how a template ends an earlier turn, the last one, and one that calls a tool."""
_THOUGHTFUL: Sequence[Any] = (_PROBES[1][0], {**_PROBES[1][1], "reasoning_content": "q0z"})
_SPACE = r"[^\S\x1c-\x1f]"  # what tokenizers take for white space: Unicode's property, of which Python has more
# Unicode's noncharacters, which text must not contain: one for each control token of a template.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class Rendered:
    """One conversation as the template writes it, with a stand-in character for each control token."""

    text: str
    spans: Sequence[tuple[int, int]]
    """Where each part that is in the loss begins and ends, in characters."""

    @property
    def in_loss(self) -> str:
        """The parts that are in the loss."""
        return "".join(self.text[begin:end] for begin, end in self.spans)


class _Tried(NamedTuple):
    """What a template does with conversations of one shape."""

    controls: Counter[int]
    fate: Fate
    pattern: Pattern | None


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
        self.control_ids = frozenset(cast("list[int]", tokenizer.convert_tokens_to_ids(controls)))
        """The ids that only a template writes."""
        self._start, self._inside = PlainEncoder(tokenizer), PlainEncoder(inside_a_text(tokenizer))
        flags = {token.content: token for token in added}
        cuts = [_with_swallowed(mark, flags.get(token)) for token, mark in marks.items()]
        self._cut = re.compile(f"({'|'.join(cuts)})")
        self.adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        """Whether the tokenizer itself puts BOS before a text."""
        self.knows_developer = re.search("['\"]developer['\"]", source) is not None
        """Whether the template has a developer; where it has none, that is the system."""
        self.is_trusted = template.origin in _TRUSTED
        """Whether the template is the recipe's, this package's or TRL's: each was tried when it was chosen."""
        self.keeps_texts = template.source in KEEP_TEXTS
        """Whether the template is known to write every text as it is."""
        self._tried = lru_cache(maxsize=_SHAPES)(self._try_shape)

    def encode(self, messages: Sequence[Message], tools: Tools | None = None) -> Encoded:
        """Return ids and labels; the loss covers what the template generates for the assistant.

        Raises:
            RowError: when a message contains a role marker, an added word that the template writes, or one of the
                stand-in characters, or when the template itself refuses the conversation or cannot keep a turn out of
                the loss.
            TemplateError: when the template cannot be rendered.
        """
        return self.tokenize([self.render(messages, tools)])[0]

    def encode_prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Return the ids of a conversation up to where the assistant's next answer starts."""
        return self.tokenize([self.render(messages, tools, add_generation_prompt=True)])[0].input_ids

    @cached_property
    def knows_reasoning(self) -> bool:
        """Whether the template has a place of its own for an assistant's reasoning; SmolLM3's is in the content."""
        try:
            return _THOUGHTFUL[1]["reasoning_content"] in self.render(_THOUGHTFUL).text
        except (RowError, TemplateError):
            return False

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

    def closes(self, labels: Ragged) -> Ragged:
        """Return, for each stretch in the loss of each list of labels, whether it ends as the template ends a turn."""
        before, after = numpy.roll(labels.values, 1), numpy.roll(labels.values, -1)
        before[labels.starts] = after[labels.ends - 1] = IGNORED  # one list ends no stretch of another
        inside, last = labels.values != IGNORED, (labels.values != IGNORED) & (after == IGNORED)
        ends = numpy.flatnonzero(last)
        sizes = ends - numpy.flatnonzero(inside & (before == IGNORED)) + 1
        closed = numpy.zeros(len(ends), dtype=bool)
        for one in self._closings or [(self.end_id,)]:
            same = [labels.values[ends - i] == token for i, token in enumerate(reversed(one))]
            closed |= numpy.logical_and.reduce([sizes >= len(one), *same])
        return Ragged(closed, labels.sums(last))

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
        controls = [i for i, token in enumerate(stretch) if token in self.control_ids]
        at = next((i for i in reversed(controls) if prefer and stretch[i] == prefer[0]), max(controls, default=None))
        if at is None or str(self.tokenizer.decode(list(stretch[at:]), skip_special_tokens=True)).strip():
            return None
        return stretch[at:]

    def spelled(self, text: str) -> str:
        """Return a rendered text with its control tokens written out."""
        return text.translate(self._tokens)

    def control_tokens(self, ids: Iterable[int]) -> Counter[int]:
        """Return how often each control token occurs among the ids."""
        return Counter(token for token in ids if token in self.control_ids)

    def structure(self, messages: Sequence[Message], tools: Tools | None = None) -> Counter[int]:
        """Return the control tokens of a conversation of this shape, which do not depend on its text."""
        return self._tried(shape_of(messages, tools)).controls

    def fate(self, messages: Sequence[Message], tools: Tools | None = None) -> Fate:
        """Return what the template leaves out of a conversation of this shape, such as `the result of message 3`.

        It is found by rendering other words in the same places. `forgotten` counts the reasoning of turns before the
        last, which thinking templates leave out on purpose.
        """
        return self._tried(shape_of(messages, tools)).fate

    def _try_shape(self, shape: str) -> _Tried:
        found = outline(shape)
        rendered = self.render(found.messages, found.tools)
        controls = self.control_tokens(self.tokenize([rendered])[0].input_ids)
        pattern = Pattern.of(found, rendered.text, rendered.spans) if self.keeps_texts else None
        return _Tried(controls, Fate.of(found, rendered.text, rendered.in_loss), pattern)

    def for_template(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages as the template knows them: where it has no developer, that is the system."""
        if self.knows_developer or all(message["role"] != "developer" for message in messages[:2]):
            return list(messages)
        return [{**message, "role": message["role"].replace("developer", "system")} for message in messages]

    def render(
        self, messages: Sequence[Message], tools: Tools | None = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Return the text of a conversation: the first half of `encode`, with the same errors."""
        if messages and messages[0]["role"] == TEXT:
            return self._render_text(messages[0]["content"])
        try:
            with self.limited():  # the template and its role markers may be a stranger's
                self._refuse_forged(messages, tools)
                rendered = render_jinja_template(  # in Jinja's sandbox
                    [self.for_template(messages)],
                    tools=cast(Any, tools),
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
            if type(error) is jinja2.TemplateError or isinstance(error, jinja2.UndefinedError | TypeError):
                # the template's own raise_exception, or a part that it needs and the conversation lacks
                raise RowError(Reason.TEMPLATE, message) from error
            raise TemplateError(message) from error
        texts, spans = cast("tuple[list[str], list[list[tuple[int, int]]]]", rendered)  # annotated as str upstream
        return Rendered(texts[0], _trained_spans(messages, spans[0] if spans else []))

    def render_each(self, conversations: Sequence[tuple[Sequence[Message], Tools | None]]) -> list[Rendered | RowError]:
        """Return each conversation rendered, or why it cannot be, under one limit of time for all of them together.

        For a template that is not trusted there is one limit of memory, too.

        Raises:
            TemplateError: when the template cannot be rendered.
        """
        try:
            with limits(_RENDER_SECONDS, None if self.is_trusted else _RENDER_BYTES):
                return [self._attempt(*conversation) for conversation in conversations]
        except (TemplateError, TimeoutError, MemoryError):  # by one of them, or by many slow ones
            return [self._attempt(*conversation) for conversation in conversations]

    def limited(self) -> AbstractContextManager[None]:
        """Return one limit for several renderings, in place of one for each."""
        return limits(_RENDER_SECONDS, _RENDER_BYTES)

    def _attempt(self, messages: Sequence[Message], tools: Tools | None) -> Rendered | RowError:
        try:
            if not self.keeps_texts or messages[0]["role"] == TEXT:
                return self.render(messages, tools)
            self._refuse_forged(messages, tools)
            pattern = self._tried(shape_of(messages, tools)).pattern
            return Rendered(*pattern.filled(messages)) if pattern else self.render(messages, tools)
        except RowError as error:
            return error

    def _render_text(self, text: str) -> Rendered:
        """Return a plain text, between BOS where the tokenizer adds one and EOS.

        All of it is in the loss but its first token, before which there is nothing to tell it from.
        """
        self._refuse_forged([{"role": TEXT, "content": text}], None)
        start = self._variables["bos_token"] if self.adds_bos else ""
        whole = f"{start}{text}{self._variables['eos_token']}"
        return Rendered(whole, [(1, len(whole))])

    def _refuse_forged(self, messages: Sequence[Message], tools: Tools | None) -> None:
        for message in messages:
            thought = inner_thought(message)  # in tags, as a model writes it where its template writes none
            texts = [*thought, *islice(words_of(message), 1, None)] if thought else words_of(message)
            for text in texts:
                self._refuse_forged_text(text, message["role"])
        for text in strings(tools):
            self._refuse_forged_text(text, "tool")

    def _refuse_forged_text(self, text: str, role: str) -> None:
        marker = self._forged_word(text) if role == TEXT else self._forged_marker(text)
        if marker:
            raise RowError(Reason.CONTROL_STRING, f"the {role}'s text contains {marker!r}")
        if not text.isascii() and (found := re.search("[\ufdd0-\ufdef]", text)):
            character = f"the noncharacter {found.group()!a}"
            raise RowError(Reason.UNENCODABLE, f"the {role}'s text contains {character}")

    def _forged_marker(self, text: str) -> str | None:
        """Return what a text must not contain, since it would become a part of the template, or None."""
        return self._forged_word(text) or self.template.forged_marker(text)

    def _forged_word(self, text: str) -> str | None:
        """Return a word of the template in a text, which would become its token; a plain text has no other markers."""
        return next((token for token in self.unescaped_words if token in text), None)

    def tokenize(self, conversations: Sequence[Rendered]) -> EncodedBatch:
        """Return the ids and labels of rendered conversations; a large batch is spread over the cores."""
        pieces = [self._cut.split(rendered.text) for rendered in conversations]
        first = iter(self._start.encode([parts[0] for parts in pieces if parts[0]]))
        others = iter(self._inside.encode([piece for parts in pieces for piece in parts[2::2] if piece]))
        found: list[Sequence[int]] = []
        inside, ends, size = [], [], 0
        for parts, rendered in zip(pieces, conversations, strict=True):
            for ids, in_loss in self._joined(parts, first, others, rendered.spans):
                found.append(ids)
                inside += [slice(size + begin, size + end) for begin, end in in_loss]
                size += len(ids)
            ends.append(size)
        values = numpy.fromiter(chain.from_iterable(found), numpy.int32, size)
        labels, lengths = numpy.full_like(values, IGNORED), numpy.diff(numpy.array(ends, numpy.int64), prepend=0)
        for part in inside:
            labels[part] = values[part]
        return EncodedBatch(Ragged(values, lengths), Ragged(labels, lengths))

    def _joined(
        self, pieces: Sequence[str], first: Iterator[Tokens], others: Iterator[Tokens], spans: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[Sequence[int], list[tuple[int, int]]]]:
        """Yield the ids of each piece of text and of each stand-in between them, and which of them are in the loss."""
        start = 0
        for i, piece in enumerate(pieces):
            if i % 2:
                mark = piece.strip()
                place = start + piece.index(mark)
                yield (self._ids[mark],), [(0, 1) for begin, end in spans if begin <= place < end]
            elif piece:
                tokens, after = next(others if i else first), start + len(piece)
                edges = [(begin - start, end - start) for begin, end in spans if begin < after and end > start]
                yield tokens.ids, [(tokens.first_from(begin), tokens.first_from(end)) for begin, end in edges]
            start += len(piece)


def _with_swallowed(mark: str, token: AddedToken | None) -> str:
    """Return the pattern of a control token, with the white space beside it that becomes part of it (Phi-3's do so)."""
    before, after = (token.lstrip, token.rstrip) if token else (False, False)
    run = f"(?:(?<!{_SPACE}){_SPACE}+)?"  # from its beginning, so that no other place in it is tried
    return (run if before else "") + mark + (f"{_SPACE}*" if after else "")


def _stretches(labels: Sequence[int]) -> list[tuple[int, ...]]:
    """Return what is in the loss, each stretch of it by itself."""
    return [tuple(stretch) for ignored, stretch in groupby(labels, IGNORED.__eq__) if not ignored]


def _trained_spans(messages: Sequence[Message], spans: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Return the spans of the turns that are in the loss, one for each assistant's turn."""
    trained = [is_trained(message) for message in messages if message["role"] == "assistant"]
    if all(trained):
        return spans
    if len(spans) != len(trained):
        what = f"the template marks {len(spans)} parts in {len(trained)} turns of the assistant"
        raise RowError(Reason.LEFT_OUT, f"{what}, so that a single turn cannot be kept out of the loss")
    return [span for span, keep in zip(spans, trained, strict=True) if keep]
