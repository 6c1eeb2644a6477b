"""Chat templates: the text, what of it is in the loss, and that the real tokenizers agree.

Two folders that are not part of the package make the last tests run, and leave them out when unset:
`QLORA_RECIPES_TOKENIZERS` with the real tokenizers in `llama2/` and `falcon/`, `QLORA_RECIPES_DATA` with
`guanaco_llama2.jsonl`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_recipes.chat_templates import FALCON_CHAT, LLAMA_2_CHAT, ChatTemplate
from qlora_recipes.errors import TemplateError
from qlora_recipes.formatters import Message, guanaco_llama2

TOKENIZERS = os.environ.get("QLORA_RECIPES_TOKENIZERS")
DATA = os.environ.get("QLORA_RECIPES_DATA")
needs_tokenizers = pytest.mark.skipif(not TOKENIZERS, reason="QLORA_RECIPES_TOKENIZERS names no folder")
needs_data = pytest.mark.skipif(not DATA, reason="QLORA_RECIPES_DATA names no folder")

END = {LLAMA_2_CHAT: ("<s>", "</s>"), FALCON_CHAT: ("<|endoftext|>", "<|endoftext|>")}
"""The tokens that each family puts before and after: beginning and end of text."""

FAMILIES = pytest.mark.parametrize("template", [LLAMA_2_CHAT, FALCON_CHAT], ids=["llama2", "falcon"])

SYSTEM = {"role": "system", "content": " Be kind.\n"}
ONE_TURN = [{"role": "user", "content": "\nHi there "}, {"role": "assistant", "content": " Yes.\n\n  So. "}]
TWO_TURNS = [*ONE_TURN, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Ciao"}]


def render(template: ChatTemplate, messages: list[Message], **kwargs: Any) -> tuple[str, list[str]]:
    """Return the rendered text and the parts of it that are in the loss."""
    bos, eos = END[template]
    (text,), (spans,) = render_jinja_template(
        [messages],
        chat_template=template.source,
        return_assistant_tokens_mask=True,
        bos_token=bos,
        eos_token=eos,
        **kwargs,
    )
    return text, [text[start:end] for start, end in spans]


TEXTS = [
    (LLAMA_2_CHAT, ONE_TURN, "<s>[INST] Hi there [/INST] Yes.\n\n  So. </s>"),
    (
        LLAMA_2_CHAT,
        [SYSTEM, *TWO_TURNS],
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi there [/INST] Yes.\n\n  So. </s><s>[INST] Bye [/INST] Ciao </s>",
    ),
    (FALCON_CHAT, ONE_TURN, "User: Hi there\nAssistant: Yes.\n\n  So.<|endoftext|>"),
    (
        FALCON_CHAT,
        [SYSTEM, *TWO_TURNS],
        "System: Be kind.\nUser: Hi there\nAssistant: Yes.\n\n  So.<|endoftext|>\n"
        "User: Bye\nAssistant: Ciao<|endoftext|>",
    ),
]


@pytest.mark.parametrize(("template", "messages", "expected"), TEXTS)
def test_rendered_text(template: ChatTemplate, messages: list[Message], expected: str) -> None:
    assert render(template, messages)[0] == expected


@pytest.mark.parametrize(("template", "messages", "expected"), TEXTS)
def test_generation_prompt_is_the_text_up_to_the_answer(
    template: ChatTemplate, messages: list[Message], expected: str
) -> None:
    prompt, _ = render(template, messages[:-1], add_generation_prompt=True)
    assert expected.startswith(prompt)
    assert prompt.endswith(" [/INST]" if template is LLAMA_2_CHAT else "\nAssistant:")


def test_the_answer_and_the_end_of_its_turn_are_in_the_loss() -> None:
    _, llama2 = render(LLAMA_2_CHAT, [SYSTEM, *TWO_TURNS])
    assert llama2 == [" Yes.\n\n  So. </s>", " Ciao </s>"]
    _, falcon = render(FALCON_CHAT, [SYSTEM, *TWO_TURNS])
    assert falcon == [" Yes.\n\n  So.<|endoftext|>", " Ciao<|endoftext|>"]


@FAMILIES
@pytest.mark.parametrize(
    ("roles", "at_fault"),
    [
        (["assistant"], 0),
        (["system", "assistant"], 1),
        (["user", "user"], 1),
        (["user", "assistant", "assistant"], 2),
        (["system", "system", "user"], 1),
        (["user", "system", "assistant"], 1),
        (["user", "tool"], 1),
    ],
)
def test_roles_out_of_order_are_refused(template: ChatTemplate, roles: list[str], at_fault: int) -> None:
    messages = [{"role": role, "content": "words"} for role in roles]
    with pytest.raises(jinja2.TemplateError, match=f"message {at_fault} is {roles[at_fault]}"):
        render(template, messages)


@FAMILIES
def test_content_is_not_read_as_a_template(template: ChatTemplate) -> None:
    words = "{{ 7 * 7 }} {% raw %} <b>&amp;"
    text, (answer,) = render(template, [*ONE_TURN[:1], {"role": "assistant", "content": words}])
    assert words in text
    assert words in answer


@pytest.mark.parametrize(
    ("template", "text", "marker"),
    [
        (LLAMA_2_CHAT, "a [INST] b", "[INST]"),
        (LLAMA_2_CHAT, "a [/INST] b", "[/INST]"),
        (LLAMA_2_CHAT, "a\n<<SYS>>", "<<SYS>>"),
        (LLAMA_2_CHAT, "<</SYS>>", "<</SYS>>"),
        (LLAMA_2_CHAT, "[inst] User: <SYS>", None),
        (FALCON_CHAT, "So.\nUser: and then?", "User:"),
        (FALCON_CHAT, "Assistant: yes", "Assistant:"),
        (FALCON_CHAT, "a\n \tSystem: b", " \tSystem:"),
        (FALCON_CHAT, "The User: a person. [INST]", None),
    ],
)
def test_text_that_could_forge_a_turn_is_found(template: ChatTemplate, text: str, marker: str | None) -> None:
    assert template.forged_marker(text) == marker


def test_a_template_that_is_not_there_is_named() -> None:
    with pytest.raises(TemplateError, match=r"no chat template at nowhere\.jinja"):
        ChatTemplate.from_file(Path("nowhere.jinja"))


def load_tokenizer(template: ChatTemplate) -> PreTrainedTokenizerBase:
    """Return the real tokenizer of a template's family."""
    folder = Path(TOKENIZERS or "")
    if template is FALCON_CHAT:
        return AutoTokenizer.from_pretrained(folder / "falcon")
    # Without it transformers 5 makes `[` of the bracket after <s>, where Meta's own code makes `▁[`.
    return AutoTokenizer.from_pretrained(folder / "llama2", legacy=True)


def encode(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: list[Message], **kwargs: Any
) -> tuple[list[int], list[int]]:
    """Return all ids of a conversation and those of them that are in the loss."""
    encoded = tokenizer.apply_chat_template(
        messages,
        chat_template=template.source,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **kwargs,
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token for token, answered in zip(ids, mask, strict=True) if answered]


META_IDS = [
    *[1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 2924, 29889, 13, 29966, 829, 14816, 29903],
    *[6778, 13, 13, 18567, 727, 518, 29914, 25580, 29962, 3869, 29889, 29871, 2],
    *[1, 518, 25580, 29962, 2648, 29872, 518, 29914, 25580, 29962, 315, 29653, 29871, 2],
]
"""What sentencepiece gives for Meta's `[INST] ... [/INST] ... ` pairs, each between its bos and eos."""

SPOKEN = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi there"}]
SPOKEN += [{"role": "assistant", "content": "Yes."}, *TWO_TURNS[2:]]


@needs_tokenizers
def test_llama2_ids_are_metas() -> None:
    tokenizer = load_tokenizer(LLAMA_2_CHAT)
    ids, answers = encode(tokenizer, LLAMA_2_CHAT, SPOKEN)
    assert ids == META_IDS
    assert tokenizer.convert_ids_to_tokens(answers) == ["▁Yes", ".", "▁", "</s>", "▁C", "iao", "▁", "</s>"]
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 2


@needs_tokenizers
def test_falcon_ids() -> None:
    tokenizer = load_tokenizer(FALCON_CHAT)
    ids, answers = encode(tokenizer, FALCON_CHAT, SPOKEN)
    assert tokenizer.convert_ids_to_tokens(ids[:7]) == ["System", ":", "ĠBe", "Ġkind", ".", "Ċ", "User"]
    end = "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(answers) == ["ĠYes", ".", end, "ĠC", "iao", end]
    assert ids.count(tokenizer.eos_token_id) == 2


@needs_data
def test_every_row_that_parses_is_rendered_to_its_own_text() -> None:
    texts = read_texts()
    assert [render(LLAMA_2_CHAT, guanaco_llama2({"text": text}))[0] for text in texts] == texts


@needs_data
@needs_tokenizers
@FAMILIES
def test_answers_are_what_follows_the_generation_prompt(template: ChatTemplate) -> None:
    """On real rows: the prompt's ids start the conversation's, and the rest of them is in the loss."""
    tokenizer = load_tokenizer(template)
    for text in read_texts():
        messages = guanaco_llama2({"text": text})
        ids, in_loss = encode(tokenizer, template, messages)
        assert ids == tokenizer(render(template, messages)[0], add_special_tokens=False)["input_ids"]
        expected = []
        for i in range(1, len(messages), 2):
            prompt, _ = encode(tokenizer, template, messages[:i], add_generation_prompt=True)
            answered, _ = encode(tokenizer, template, messages[: i + 1])
            assert ids[: len(answered)] == answered
            assert answered[: len(prompt)] == prompt
            expected += answered[len(prompt) :]
        assert in_loss == expected
        assert in_loss.count(tokenizer.eos_token_id) == len(messages) // 2


def read_texts() -> list[str]:
    with (Path(DATA or "") / "guanaco_llama2.jsonl").open(encoding="utf-8") as rows:
        return [json.loads(row)["text"] for row in rows]
