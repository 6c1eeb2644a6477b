"""The shape of a conversation with other words in it, to see what a template does with each of its parts.

Rendered once for each shape, it tells which control tokens the template writes and which parts it leaves out.
Knows nothing of tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, count, zip_longest
from typing import Any

from qlora_recipes.formatters import TEXT, Message, Tools, inner_thought, is_trained

_WORD = "words"
_THOUGHT = "<think>\n{}\n</think>\n\n{}"
# Words of JSON schemas, by which templates choose what they write; all others are somebody's.
_SCHEMA_KEYS = frozenset(
    "type function name description parameters return returns properties required items enum default format anyOf "
    "oneOf allOf minimum maximum additionalProperties nullable title strict".split()
)
_SCHEMA_VALUES = frozenset("function object array string number integer boolean null".split())


@dataclass(frozen=True)
class Outline:
    """A conversation of unique words, and which of them a text lacks."""

    messages: list[Message]
    tools: Tools | None
    words: Mapping[str, str]
    """Each word to what it stands for."""
    thoughts: frozenset[str]
    """The words of reasoning that a template may leave out: of turns before the last."""
    trained: frozenset[str]
    """The words of the turns that are in the loss."""


@dataclass(frozen=True)
class Fate:
    """What a template did with the parts of an outline."""

    left_out: tuple[str, ...]
    """What is nowhere in the text."""
    misplaced: tuple[str, ...]
    """What is in the loss and should not be, or should be and is not."""
    forgotten: int
    """Turns before the last that lost their reasoning."""

    @classmethod
    def of(cls, outline: Outline, text: str, in_loss: str) -> Fate:
        """Return the fate of an outline's words in a rendered text, of which a part is in the loss."""
        words, missing = outline.words, {word for word in outline.words if word not in text}
        misplaced = (word for word in words.keys() - missing if (word in in_loss) != (word in outline.trained))
        return cls(
            left_out=tuple(dict.fromkeys(words[word] for word in words if word in missing - outline.thoughts)),
            misplaced=tuple(sorted({words[word] for word in misplaced})),
            forgotten=len(outline.thoughts & missing),
        )


@dataclass(frozen=True)
class Pattern:
    """What a template writes around the texts of conversations of one shape, if it writes each of them as it is."""

    pieces: Sequence[str]
    """What is before, between and after the texts."""
    spans: Sequence[tuple[tuple[int, int], tuple[int, int]]]
    """Where each part that is in the loss begins and ends: a piece, and a place in it."""

    @classmethod
    def of(cls, outline: Outline, text: str, spans: Sequence[tuple[int, int]]) -> Pattern | None:
        """Return the pattern of a rendered outline; None where a message is more than one text, or is not written."""
        texts = [message["content"] for message in outline.messages]
        if texts != list(outline.words) or re.findall("q[0-9]+z", text) != texts:
            return None
        pieces = re.split("q[0-9]+z", text)
        starts = list(_starts(pieces, texts))
        at = {start + i: (k, i) for k, start in enumerate(starts) for i in range(len(pieces[k]) + 1)}
        return cls(pieces, [(at[begin], at[end]) for begin, end in spans])

    def filled(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation of this shape, and the parts of it that are in the loss."""
        texts = [message["content"].strip() for message in messages]
        starts = list(_starts(self.pieces, texts))
        text = "".join(chain.from_iterable(zip_longest(self.pieces, texts, fillvalue="")))
        return text, [(starts[i] + begin, starts[k] + end) for (i, begin), (k, end) in self.spans]


def _starts(pieces: Sequence[str], texts: Sequence[str]) -> Iterator[int]:
    """Return where each piece begins, when a text follows each but the last."""
    lengths = (len(piece) + len(text) for piece, text in zip(pieces, texts, strict=False))
    return accumulate(lengths, initial=0)


def shape_of(messages: Sequence[Message], tools: Tools | None) -> str:
    """Return all of a conversation but its words, as JSON: two of one shape are rendered alike."""
    if tools is None and all(len(message) == 2 for message in messages):
        return _plain_shape(tuple((message["role"], _shape_of_content(message)) for message in messages))
    said = [{key: _without_words(part, key == "tool_calls") for key, part in each.items()} for each in messages]
    fixed = ({"role": message["role"], "content": _shape_of_content(message)} for message in messages)
    roles = [{**shape, **same} for shape, same in zip(said, fixed, strict=True)]
    return json.dumps([roles, _without_words(tools, schema=True)])


@cache
def _plain_shape(turns: tuple[tuple[str, str], ...]) -> str:
    return json.dumps([[{"role": role, "content": content} for role, content in turns], None])


def _shape_of_content(message: Message) -> str:
    """Return a word for a text, none for an empty one, and two for an answer that holds its reasoning."""
    if thought := inner_thought(message):
        return _THOUGHT.format(*(_WORD if part else "" for part in thought))
    return _WORD if message["content"] else ""


def _without_words(value: Any, schema: bool = False) -> Any:
    """Return a value with one word for every text, 0 for every number; `schema` keeps what a JSON schema is made of."""
    if isinstance(value, str):
        return value if schema and value in _SCHEMA_VALUES else _WORD if value else ""
    if isinstance(value, Mapping):
        parts = enumerate(value.items())
        return {
            key if schema and key in _SCHEMA_KEYS | {"id", "arguments"} else f"{_WORD}{i}": _without_words(part, schema)
            for i, (key, part) in parts
        }
    if isinstance(value, list):
        return [_without_words(part, schema) for part in value]
    return value if value is None or isinstance(value, bool) else 0


def outline(shape: str) -> Outline:
    """Return a conversation of a shape, in which every text that a template must render is a word of its own."""
    messages, tools = json.loads(shape)
    unique = (f"q{number}z" for number in count())
    words: dict[str, str] = {}
    thoughts: set[str] = set()
    trained: set[str] = set()
    last = max((i for i, message in enumerate(messages) if is_trained(message)), default=0)
    calls = 0
    for i, message in enumerate(messages):
        role, where, before = message["role"], f"message {i}", len(words)
        if thought := inner_thought(message):
            reasoning, word = ((next(unique) if part else "") for part in thought)
            message["content"] = _THOUGHT.format(reasoning, word)
            words |= {reasoning: f"the reasoning of {where} (assistant)"} if reasoning else {}
            words |= {word: f"the text of {where} (assistant)"} if word else {}
            thoughts |= {reasoning} if reasoning and i != last else set()
        elif message["content"]:
            word = message["content"] = next(unique)
            words[word] = f"the {'result' if role == 'tool' else 'text'} of {where}" + f" ({role})" * (role != TEXT)
        if message.get("reasoning_content"):
            word = message["reasoning_content"] = next(unique)
            words[word] = f"the reasoning of {where} (assistant)"
            if i != last:
                thoughts.add(word)
        for call in message.get("tool_calls", ()):
            function, calls = call["function"], calls + 1
            if "id" in call:
                call["id"] = f"call{calls:05}"  # nine letters and digits, as Mistral's templates require
            function["name"] = _named(unique, words, f"a call in {where} (assistant)")
            what = f"the arguments of a call in {where} (assistant)"
            function["arguments"] = _renamed(function["arguments"], unique, words, what)
        if "tool_call_id" in message:
            message["tool_call_id"] = f"call{calls:05}"
        trained |= set(list(words)[before:]) if is_trained(message) else set()
    for tool in tools or ():
        tool["function"]["name"] = _named(unique, words, "the tools")
    return Outline(messages, tools, words, frozenset(thoughts), frozenset(trained))


def _named(unique: Iterator[str], words: dict[str, str], what: str) -> str:
    word = next(unique)
    words[word] = what
    return word


def _renamed(value: Any, unique: Iterator[str], words: dict[str, str], what: str) -> Any:
    """Return arguments with a word of its own in place of every text and every name."""
    if isinstance(value, str):
        return _named(unique, words, what) if value else value
    if isinstance(value, dict):
        return {_named(unique, words, what): _renamed(part, unique, words, what) for part in value.values()}
    if isinstance(value, list):
        return [_renamed(part, unique, words, what) for part in value]
    return value
