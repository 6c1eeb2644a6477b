"""Rows by the batch: what is found is what looking at each row and each token by itself finds."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preflight_runs import read
from small_tokenizers import small_tokenizer

from qlora_recipes import ChatTemplate
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.chat_templates import FALCON_CHAT, LLAMA_2_CHAT, PLAIN_CHAT
from qlora_recipes.data import encoding, prepare
from qlora_recipes.data.encoding import IGNORED, ConversationEncoder, Rendered
from qlora_recipes.data.outline import shape_of
from qlora_recipes.data.ragged import Ragged
from qlora_recipes.data.sandbox import limits
from qlora_recipes.data.words import hash_words
from qlora_recipes.errors import TemplateError
from qlora_recipes.formatters import Reason, RowError
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT, ModelSpec
from qlora_recipes.settings import STANDIN

ASKED = [{"role": "user", "content": "Where does Ada live?"}, {"role": "assistant", "content": "In Örebro."}]
TEXTS = st.text(st.sampled_from("aB é瑞😊\u0301\n\t.,_0 İ\u00df"), max_size=30)
CONVERSATIONS = st.lists(
    st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=12).map(" ".join), min_size=1, max_size=4), min_size=1
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def encoders() -> dict[str, ConversationEncoder]:
    specs = (LLAMA_2_7B_CHAT, FALCON_7B)
    made = {spec.family: (spec, load_tokenizer(spec, STANDIN + spec.family, None)) for spec in specs}
    return {family: ConversationEncoder(tokenizer, spec.chat_template) for family, (spec, tokenizer) in made.items()}


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, begin=st.integers(0, 30), size=st.integers(0, 30))
@pytest.mark.parametrize("spec", [LLAMA_2_7B_CHAT, FALCON_7B], ids=lambda spec: spec.family)
def test_labels_are_those_of_every_tokens_offset(
    encoders: dict[str, ConversationEncoder], spec: ModelSpec, text: str, begin: int, size: int
) -> None:
    encoder = encoders[spec.family]
    found = encoder.tokenize([Rendered(text, [(begin, begin + size)])])[0]
    options: Any = dict(add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    wanted = encoder.tokenizer(text, **options)
    assert found.input_ids == wanted["input_ids"]
    starts = [start for start, _ in wanted["offset_mapping"]]
    inside = [begin <= start < begin + size for start in starts]
    assert found.labels == [token if keep else IGNORED for token, keep in zip(found.input_ids, inside, strict=True)]


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXTS.filter(str.strip), min_size=4, max_size=7), with_system=st.booleans(), kept=st.booleans())
@pytest.mark.parametrize("template", [LLAMA_2_CHAT, FALCON_CHAT, PLAIN_CHAT], ids=lambda template: template.name)
def test_our_templates_write_every_text_as_it_is(
    encoders: dict[str, ConversationEncoder], template: ChatTemplate, texts: list[str], with_system: bool, kept: bool
) -> None:
    """So that what is around the texts of one conversation is around those of every other with the same roles."""
    encoder = ConversationEncoder(encoders["falcon" if template == FALCON_CHAT else "llama2"].tokenizer, template)
    roles = ["system"] * with_system + ["user", "assistant"] * 3
    said: Any = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    said = [{**message, "train": kept} if message["role"] == "assistant" else message for message in said]
    said[-1].pop("train", None)
    assert encoder._tried(shape_of(said, None)).pattern
    assert encoder.render_each([(said, None)]) == [encoder.render(said)]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@given(TEXTS)
def test_words_are_those_of_the_expression(text: str) -> None:
    """And neither case, punctuation nor what kind of space there is makes a difference."""
    plain = " ".join(words(text))
    one, same, other = (hash_words([[said]]) for said in (text, plain, f"{plain} more"))
    assert one.whole == same.whole != other.whole
    assert one.passages.values.tolist() == same.passages.values.tolist()


@settings(deadline=None)
@given(CONVERSATIONS)
def test_passages_are_those_of_each_conversation(conversations: list[list[str]]) -> None:
    """Two passages have one hash where they have the same words, and nowhere else."""
    expected = []
    for texts in conversations:
        said = [tuple(words(text)) for text in texts]
        own = set()
        for before, current in zip([(), *said], said, strict=False):
            text = before + current if len(current) < 8 else current
            own |= {text[start : start + 8] for start in range(max(1, len(text) - 7))}
        expected.append((tuple(said), own))
    hashes = hash_words(conversations)
    found = [set(part.tolist()) for part in hashes.passages.split()]
    assert list(map(len, found)) == [len(own) for _, own in expected]
    for i, (said, own) in enumerate(expected):
        for k, (other_said, other) in enumerate(expected[:i]):
            assert len(found[i] & found[k]) == len(own & other)
            assert (hashes.whole[i] == hashes.whole[k]) == (said == other_said)


@given(st.lists(st.lists(st.sampled_from([IGNORED, 1, 2]), min_size=1, max_size=9), min_size=1, max_size=5))
def test_ends_of_turns_are_those_of_each_row(rows: list[list[int]]) -> None:
    class Closing(ConversationEncoder):
        def __init__(self) -> None:
            self._closings = [(2, 1), (2,)]  # type: ignore[misc]  # in place of those of a template

    expected = [
        [
            stretch[-2:] == [2, 1] or stretch[-1:] == [2]
            for stretch in (list(s) for k, s in groupby(row, IGNORED.__eq__) if not k)
        ]
        for row in rows
    ]
    found = Closing().closes(Ragged.of(rows))
    assert [part.tolist() for part in found.split()] == expected


@pytest.mark.parametrize(
    ("origin", "source", "part"),
    [
        ("recipe", LOOP, "it ran for 0.2 seconds"),
        ("marked", LOOP, "it ran for 0.2 seconds"),
        ("marked", "{{ 'x' * 10**10 }}", "MemoryError"),  # of a recipe's, memory is limited only when it is chosen
    ],
)
def test_a_template_that_turns_hostile_is_stopped(
    monkeypatch: pytest.MonkeyPatch, origin: Any, source: str, part: str
) -> None:
    """After rows that it renders, so that it was believed."""
    monkeypatch.setattr(encoding, "_RENDER_SECONDS", 0.2)
    source = "{% if messages[0].content == 'now' %}" + source + "{% endif %}{{ eos_token }}"
    tokenizer = small_tokenizer(eos_token="<end>")
    encoder = ConversationEncoder(tokenizer, ChatTemplate(source, "mine.jinja", origin=origin))
    good, bad = (ASKED, None), ([{"role": "user", "content": "now"}, ASKED[1]], None)
    assert all(isinstance(found, Rendered) for found in encoder.render_each([good] * 3))
    with pytest.raises(TemplateError, match=part):
        encoder.render_each([good, bad, good])


def test_a_row_that_a_template_refuses_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a batch that takes too long as a whole is rendered row by row."""
    monkeypatch.setattr(encoding, "_RENDER_SECONDS", 0.1)
    source = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    slow = "{% for a in range(99999) %}{{ '' }}{% endfor %}"
    encoder = ConversationEncoder(small_tokenizer(eos_token="<end>"), ChatTemplate(source + slow, "mine.jinja"))
    refused = [{"role": "user", "content": "no"}, ASKED[1]]
    found = encoder.render_each([(ASKED, None), (refused, None), *[(ASKED, None)] * 20])
    errors = [one for one in found if isinstance(one, RowError)]
    assert (len(found), [error.reason for error in errors], found[1]) == (22, [Reason.TEMPLATE], errors[0])


def test_an_inner_limit_is_the_outer_one() -> None:
    with pytest.raises(TimeoutError, match=r"0\.1 seconds"), limits(0.1, None):
        with limits(60, None):
            pass
        while True:
            pass


def test_small_batches_change_nothing(monkeypatch: pytest.MonkeyPatch, recipe_for: Any, tiny: Any) -> None:
    """Whatever is rendered while others are encoded, rows, their order and the receipt are the same."""

    whole = read(recipe_for("llama2"), tiny("llama2")).data
    monkeypatch.setattr(prepare, "_BATCH", 1)
    small = read(recipe_for("llama2"), tiny("llama2")).data
    assert small.receipt == whole.receipt
    assert list(small.train) == list(whole.train) and list(small.held_out) == list(whole.held_out)
    names = [name for name in whole.figures.dtype.names if name != "words"]
    assert numpy.array_equal(small.figures[names], whole.figures[names])
