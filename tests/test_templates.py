"""The choice of a template, its marks against TRL's, and what is found in a tokenizer: end of turn and padding."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from preflight_runs import read, verdict_of
from small_tokenizers import small_tokenizer
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.chat_templates import LLAMA_2_CHAT, ChatTemplate
from qlora_recipes.data.encoding import IGNORED, ConversationEncoder
from qlora_recipes.data.ragged import Ragged
from qlora_recipes.data.templates import choose_template, dated, fault_of, mark
from qlora_recipes.errors import DataError, ModelError, RecipesError, TemplateError
from qlora_recipes.evaluation.generation import ended, generate
from qlora_recipes.formatters import Message, Reason, RowError
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.preflight import BEFORE_LOADING, prompts, run_checks

FOLDER = Path(trl.__file__).parent / "chat_templates"
PAIRS = sorted(file.name.removesuffix("_training.jinja") for file in FOLDER.glob("*_training.jinja"))
UNNAMED = replace(LLAMA_2_7B_CHAT, hub_id="somebody/a-model", chat_template=None, pad_token=None, tokenizer={})
"""A model of which nothing is specified."""

# DeepSeek's bars are wide.
SPECIAL = re.compile(
    "<[|\uff5c][^<>'\"\\s]{1,40}[|\uff5c]>" + r"|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|\[/?INST\]|\[gMASK\]|<sop>"
)
WORDS = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")  # added to vocabularies, but not special


def ask(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ONE = ask("Where does Ada live?", "In Örebro.")
SEVERAL = [*ONE, *ask("And  her\n\ndog?", "With her.\n\nYes.")]
CALL = {"type": "function", "function": {"name": "where", "arguments": {"name": "Ada"}}}
CONVERSATIONS: dict[str, list[Any]] = {
    "one turn": ONE,
    "several turns": SEVERAL,
    "system": [{"role": "system", "content": "Be brief."}, *SEVERAL],
    "tool": [
        ONE[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "where", "content": "Örebro"},
        ONE[1],
    ],
}
VISION = "reads messages made of parts, as the processors of vision models make them"
NOT_TRAINED = {"idefics3": VISION, "llava_next": VISION, "smolvlm": VISION}
"""TRL's templates that are refused, and why."""

OPENS_REASONING = "the prompt opens the reasoning, which an answer without reasoning does not"
DROPS_TURNS = "writes an earlier turn in another way than the last one"
NOT_MARKED = NOT_TRAINED | {
    **dict.fromkeys(["deepseek_r1_distill", "deepseekv3"], OPENS_REASONING),
    **{f"nemotron_3_{size}": OPENS_REASONING for size in ("5_lightning", "nano", "super", "ultra")},
    "glm4moe": "no token ends an answer",
}
"""Templates whose answers cannot be marked here without TRL's version."""

NOT_SEVERAL = dict.fromkeys(
    ["gptoss", "phi3", "phi3_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"], DROPS_TURNS
)
"""Those of the others of which a conversation with several turns is refused."""


def source_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def training_source_of(name: str) -> str:
    return dated(ChatTemplate(source_of(f"{name}_training"), name)).source


def tokenizer_for(source: str, **named: str) -> PreTrainedTokenizerFast:
    special, words = dict.fromkeys(SPECIAL.findall(source)), dict.fromkeys(WORDS.findall(source))
    return small_tokenizer([*special], [*words], template=source, **{"bos_token": "<s>", "eos_token": "</s>", **named})


def trls(tokenizer: PreTrainedTokenizerFast, messages: list[Any], source: str) -> tuple[list[int], list[int]] | None:
    """Return ids and mask as SFTTrainer makes them; None where the template refuses the conversation."""
    try:
        made = tokenizer.apply_chat_template(
            messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception:  # a template may raise anything
        return None
    return made["input_ids"], made["assistant_masks"]


def ours(encoder: ConversationEncoder, messages: list[Any]) -> tuple[list[int], list[int]] | None:
    try:
        encoded = encoder.encode(messages)
    except RecipesError:
        return None
    return encoded.input_ids, [int(label != IGNORED) for label in encoded.labels]


@pytest.mark.parametrize("name", PAIRS)
def test_ids_and_mask_are_trls_own(name: str) -> None:
    """Of all of TRL's training templates, token by token; a template refuses what it refuses in TRL."""
    source, training = source_of(name), training_source_of(name)
    tokenizer = tokenizer_for(source)
    encoder = ConversationEncoder(tokenizer, ChatTemplate(training, name))
    compared = 0
    for kind, messages in CONVERSATIONS.items():
        expected = trls(tokenizer, messages, training)
        assert ours(encoder, messages) == expected, kind
        compared += expected is not None
    if name in NOT_TRAINED:
        with pytest.raises(TemplateError, match=r"messages made of parts|no attribute 'text'"):
            choose_template(UNNAMED, tokenizer)
        return
    chosen = choose_template(UNNAMED, tokenizer)
    assert (chosen.source, chosen.name, chosen.origin) == (training, f"{name}_training.jinja", "trl")
    assert compared >= 2


@pytest.mark.parametrize("name", PAIRS)
def test_marks_are_trls_or_the_template_is_refused(name: str) -> None:
    """As if TRL did not know it: the loss is what TRL has in it and the prompt does not, or there is none."""
    source, training = source_of(name), training_source_of(name)
    unknown = source + "{# unknown #}"
    same_day = dated(ChatTemplate(unknown, name)).source
    tokenizer = tokenizer_for(unknown)
    if name in NOT_MARKED:
        with pytest.raises(TemplateError):
            choose_template(UNNAMED, tokenizer)
        return
    chosen = choose_template(UNNAMED, tokenizer)
    assert chosen.origin == "marked"
    encoder = ConversationEncoder(tokenizer, chosen)
    for kind, messages in list(CONVERSATIONS.items())[:3]:
        expected, got = trls(tokenizer, messages, training), ours(encoder, messages)
        if expected is None or (name in NOT_SEVERAL and messages is not ONE):
            assert got is None, kind
            continue
        assert got is not None and got[0] == expected[0], kind
        assert got[0] == trls(tokenizer, messages, same_day + "{# {% generation %} #}")[0]  # the text is the original's
        prompt = encoder.encode_prompt(messages[:-1])
        assert sum(got[1]) > 0 and not any(got[1][i] and not expected[1][i] for i in range(len(got[0]))), kind
        assert got[1][len(prompt) :] == expected[1][len(prompt) :] == [1] * (len(got[0]) - len(prompt)), kind


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def encoder_of(source: str, **named: str) -> ConversationEncoder:
    tokenizer = tokenizer_for(source, **named)
    return ConversationEncoder(tokenizer, choose_template(UNNAMED, tokenizer))


def in_loss(encoder: ConversationEncoder, messages: list[Any]) -> str:
    return str(encoder.tokenizer.decode([label for label in encoder.encode(messages).labels if label != IGNORED]))


def test_a_template_that_nobody_knows_is_marked() -> None:
    encoder = encoder_of(CHATML)
    assert in_loss(encoder, SEVERAL) == "In Örebro.<|im_end|>\nWith her.\n\nYes.<|im_end|>\n"
    assert (encoder.end_token, encoder.template.role_markers) == ("<|im_end|>", None)
    assert encoder.closes(Ragged.of([encoder.encode(SEVERAL).labels])).values.tolist() == [True, True]
    cut = encoder.encode(SEVERAL).labels[:-2]  # without <|im_end|> and the newline
    assert encoder.closes(Ragged.of([cut])).values.tolist() == [True, False]


def test_words_after_an_answer_are_not_left_in_the_loss() -> None:
    """Marks that reach into the header of the next turn."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s> user: ' }}"
        "{% endgeneration %}{% else %}{{ m.content + ' assistant: ' }}{% endif %}{% endfor %}"
    )
    encoder = ConversationEncoder(tokenizer_for(source), ChatTemplate(source, "mine.jinja"))
    assert fault_of(encoder, ONE, encoder.render(ONE)) == "words after an answer are in the loss"


def test_marks_that_hold_more_than_the_answer_are_replaced() -> None:
    """As SmolLM3's, which have the role's header in them."""
    header, prompt = (
        "{{ '<|im_start|>' + m.role + '\n' }}",
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    wide = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        + header
        + "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        + header
        + "{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        + prompt
    )
    encoder = encoder_of(wide)
    assert encoder.template.origin == "marked"
    assert in_loss(encoder, ONE) == "In Örebro.<|im_end|>"
    narrow = wide.replace("{% generation %}" + header, header + "{% generation %}")
    assert encoder_of(narrow).template.origin == "tokenizer"


@pytest.mark.parametrize("ends", ["\n", "", "\n\n"])
@pytest.mark.parametrize("begins", ["\n", "", "  ", "\n\n"])
def test_the_text_around_a_template_stays_when_it_is_marked(begins: str, ends: str) -> None:
    source = begins + CHATML + ends
    tokenizer = tokenizer_for(source)
    expected = tokenizer.apply_chat_template(ONE, tokenize=False)
    marked = mark(ChatTemplate(source, "own.jinja"))
    assert tokenizer.apply_chat_template(ONE, tokenize=False, chat_template=marked.source) == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML.replace("{% if add", "{% if false and add"), "ignores add_generation_prompt.*assistant"),
        (CHATML.replace("'<|im_end|>'", "''"), "no control token ends an answer"),
        (CHATML.replace("in messages", "in messages[-1:]"), "prompt for message 1 is not what stands before"),
        (CHATML.replace("assistant\n'", "model\n'"), "prompt for message 1 is not what stands before"),
        (CHATML.replace("m.content", "m.text"), "UndefinedError"),
        (CHATML.replace("m.content", "(m.content if m.content is not string else '')"), "drops the text of an answer"),
        ("a\nb\n{% if %}", r"chat_template\.jinja cannot render .*, in line 3"),
        ("{{ raise_exception('no chat') }}", "TemplateError: no chat"),
    ],
)
def test_a_template_that_cannot_be_marked_is_refused(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        encoder_of(source)


def test_a_system_turn_that_a_template_refuses_is_the_rows_fault() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    encoder = encoder_of(strict)
    assert encoder.encode(ONE).supervised
    with pytest.raises(RowError, match="no system role") as caught:
        encoder.encode(CONVERSATIONS["system"])
    assert caught.value.reason == Reason.TEMPLATE


def test_plain_text_that_opens_turns_is_refused_in_a_message() -> None:
    plain = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' [/INST] ' + m.content + '</s>' }}"
        "{% elif m.role == 'user' %}{{ '[TASK] ' + m.content }}"
        "{% else %}{{ m.role + ':\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' [/INST]' }}{% endif %}"
    ).replace("[/INST]", "[ANSWER]")
    encoder = encoder_of(plain)
    for text in ("a [TASK] b", "a [ANSWER] b"):
        with pytest.raises(RowError) as caught:
            encoder.encode(ask(text, "Yes."))
        assert caught.value.reason == Reason.CONTROL_STRING
    assert encoder.encode(ask("a task, b. ANSWER", "Yes.")).supervised


def test_a_model_without_a_template_takes_the_plain_one() -> None:
    tokenizer = small_tokenizer(eos_token="</s>", bos_token="<s>")
    encoder = ConversationEncoder(tokenizer, choose_template(UNNAMED, tokenizer))
    assert (encoder.template.name, encoder.template.origin) == ("plain.jinja", "plain")
    text = encoder.spelled(encoder.render(CONVERSATIONS["system"]).text)
    assert text == (
        "<s>### System:\nBe brief.\n\n### User:\nWhere does Ada live?\n\n### Assistant:\nIn Örebro.</s>\n\n"
        "### User:\nAnd  her\n\ndog?\n\n### Assistant:\nWith her.\n\nYes.</s>"
    )
    assert in_loss(encoder, ONE) == "\nIn Örebro.</s>"
    assert encoder.spelled(encoder.render(ONE[:1], add_generation_prompt=True).text) == text[:3] + (
        "### User:\nWhere does Ada live?\n\n### Assistant:"
    )
    with pytest.raises(RowError, match="contains '### Assistant:'"):
        encoder.encode(ask("a\n### Assistant:\nb", "Yes."))


def test_the_recipes_own_template_comes_first_and_ours_before_the_tokenizers() -> None:
    tokenizer = tokenizer_for(CHATML)
    own = ChatTemplate(CHATML + "{# mine #}", "mine.jinja")
    chosen = choose_template(replace(UNNAMED, chat_template=own), tokenizer)
    assert (chosen.name, chosen.origin) == ("mine.jinja", "recipe")
    assert (
        in_loss(ConversationEncoder(tokenizer, chosen), ONE) == "In Örebro.<|im_end|>\n"
    )  # marked, as it has no marks
    assert choose_template(replace(LLAMA_2_7B_CHAT, chat_template=None), tokenizer) == LLAMA_2_CHAT


# ---- End of turn and padding, of a tokenizer in a folder ----


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, **config: Any) -> str:
    tokenizer.save_pretrained(folder)
    made = LlamaConfig(**{"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **config})
    (folder / "config.json").write_text(json.dumps(made.to_dict()))
    return str(folder)


@pytest.mark.parametrize(
    ("special", "named", "expected"),
    [
        ([], {"pad_token": "<pad>"}, "<pad>"),
        (["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"], {}, "<|finetune_right_pad_id|>"),
        (["<|reserved_special_token_0|>", "<|image_pad|>"], {}, "<|reserved_special_token_0|>"),
        (["<|fim_prefix|>", "<|fim_pad|>"], {"pad_token": "</s>"}, "<|fim_pad|>"),
        (["<|reserved_0|>"], {"pad_token": "<|im_end|>"}, "<|reserved_0|>"),
        (["<|reserved_0|>"], {"pad_token": "<s>"}, "<|reserved_0|>"),
        (["<0x00>", "<0xFF>"], {"unk_token": "<unk>"}, "<unk>"),
        ([">>TITLE<<", ">>SUFFIX<<"], {"unk_token": "<unk>"}, ">>TITLE<<"),  # Falcon's, which are used by no template
    ],
)
def test_the_pad_token_is_one_without_a_use(
    tmp_path: Path, special: list[str], named: dict[str, str], expected: str
) -> None:
    tokenizer = small_tokenizer(
        ["<|im_start|>", "<|im_end|>", *special], template=CHATML, bos_token="<s>", eos_token="</s>", **named
    )
    loaded = load_tokenizer(UNNAMED, saved(tmp_path, tokenizer), None)
    assert loaded.pad_token == expected
    assert len(loaded) == len(tokenizer)


def test_a_vocabulary_without_a_free_token_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, tokenizer_for(CHATML, unk_token="<unk>"))
    with pytest.raises(TemplateError, match=r"no token to pad with.*<\|im_end\|>.*ModelSpec\.pad_token"):
        load_tokenizer(UNNAMED, folder, None)
    assert load_tokenizer(replace(UNNAMED, pad_token="<unk>"), folder, None).pad_token == "<unk>"


def test_a_pad_token_beyond_the_embedding_is_not_taken(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(["<|im_start|>", "<|im_end|>", "<|reserved|>"], template=CHATML, eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    folder = saved(tmp_path, tokenizer, vocab_size=len(tokenizer) - 1)
    assert load_tokenizer(UNNAMED, folder, None).pad_token == "<|reserved|>"


@pytest.mark.parametrize(
    ("config", "part"), [({"vocab_size": 100}, "256 tokens, the embedding 100"), ({"eos_token_id": 9000}, "is 9,000")]
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, config: dict[str, int], part: str) -> None:
    with pytest.raises(ModelError, match=f"{part}.*belongs to another model"):
        load_tokenizer(UNNAMED, saved(tmp_path, tokenizer_for(CHATML), **config), None)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        *[("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("gptoss", "<|return|>"), ("phi3", "<|end|>")],
        *[("qwen3", "<|im_end|>"), ("cohere2", "<|END_OF_TURN_TOKEN|>"), ("glm4moe", "<|user|>")],
    ],
)
def test_the_end_of_a_turn_is_the_templates(name: str, end: str) -> None:
    encoder = encoder_of(source_of(name))
    assert encoder.end_token == end != encoder.tokenizer.eos_token
    for messages in CONVERSATIONS.values():
        try:
            labels = encoder.encode(messages).labels
        except RowError:
            continue
        assert all(encoder.closes(Ragged.of([labels])).values.tolist())


# ---- Rows of a run, and generation ----


ROWS = [ask(f"What is {i} and {i}?", f"That is {2 * i}, of course.") for i in range(12)]


def recipe_of(recipe_for: Callable[..., type[Recipe]], folder: Path, rows: list[list[Message]]) -> type[Recipe]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    dataset = DatasetSpec(str(file), demo="guanaco_llama2")
    return recipe_for(model=UNNAMED, dataset=dataset, training=dict(max_steps=1, max_length=2048))


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gptoss", "phi3", "glm4moe", "own", "plain"])
def test_rows_pass_every_check(name: str, recipe_for: Callable[..., type[Recipe]], tmp_path: Path) -> None:
    """Text after the end token is allowed, and the end need not be EOS: TRL's qwen3 was refused for both."""
    source = {"own": CHATML, "plain": ""}.get(name, source_of(name) if name in PAIRS else "")
    tokenizer = tokenizer_for(source, pad_token="<pad>")
    several = [[*ROWS[i], *ROWS[i + 1]] for i in range(10)]
    run = read(recipe_of(recipe_for, tmp_path, [*ROWS, *several]), Path(saved(tmp_path / "model", tokenizer)))
    checks = run_checks(BEFORE_LOADING, run)
    assert {check.name for check in checks if check.verdict != "pass"} <= {
        "duplicates",
        "contamination",
        "held_out_rows",
    }
    receipt = run.data.template
    assert receipt.origin == {"own": "marked", "plain": "plain"}.get(name, "trl")
    assert receipt.end_token_trained and receipt.end_token == run.encoder.end_token
    assert receipt.sha256 == run.encoder.template.sha256


def test_a_prompt_that_opens_the_reasoning_is_refused_for_rows_without(
    recipe_for: Callable[..., type[Recipe]], tmp_path: Path
) -> None:
    tokenizer = tokenizer_for(source_of("nemotron_3_nano"), pad_token="<pad>")
    run = read(recipe_of(recipe_for, tmp_path, ROWS), Path(saved(tmp_path / "model", tokenizer)))
    check = verdict_of(prompts.template_agrees, run)
    assert check.verdict == "fail"
    assert "opens the reasoning" in check.advice


def test_rows_with_a_turn_that_the_template_refuses_are_dropped(
    recipe_for: Callable[..., type[Recipe]], tmp_path: Path
) -> None:
    tokenizer = tokenizer_for(source_of("gemma"), pad_token="<pad>")
    model = Path(saved(tmp_path / "model", tokenizer))
    system = [[{"role": "system", "content": "Be brief."}, *row] for row in ROWS]
    run = read(recipe_of(recipe_for, tmp_path, [*ROWS, *system[:5]]), model)
    assert run.data.receipt.rows_dropped == {Reason.TEMPLATE: 5}
    with pytest.raises(
        DataError, match=r"12 refused by the template[\s\S]*System role not supported[\s\S]*Take a model"
    ):
        read(recipe_of(recipe_for, tmp_path, system), model)


def test_answers_stop_at_the_end_of_a_turn_and_where_the_model_itself_stops() -> None:
    encoder = encoder_of(source_of("llama3"), pad_token="<pad>")
    call, hi = encoder.tokenizer.eos_token_id, encoder.tokenizer("Hi")["input_ids"]
    asked: dict[str, Any] = {}

    def continued(**options: Any) -> torch.Tensor:
        asked.update(options)
        rows = [[*hi, encoder.end_id, 0], [*hi, call, 0], [*hi, 5, 6]]
        return torch.cat([options["input_ids"], torch.tensor(rows)], 1)

    for own in (call, [encoder.end_id, call]):
        model: Any = SimpleNamespace(
            device="cpu",
            config=SimpleNamespace(),
            generate=continued,
            generation_config=GenerationConfig(eos_token_id=own),
        )
        found = generate(model, [[1], [1], [1]], end=encoder.end_id, pad=0)
        assert asked["eos_token_id"] == [encoder.end_id, call]
        assert found == [[*hi, encoder.end_id], [*hi, call], [*hi, 5, 6]]
        assert [ended(model, encoder.end_id, answer) for answer in found] == [True, True, False]
    model.generation_config = GenerationConfig()
    assert len(generate(model, [[1], [1], [1]], end=encoder.end_id, pad=0)[1]) == len(hi) + 2


@pytest.mark.parametrize("name", ["gptoss", "llama3_2"])
def test_a_template_writes_the_same_day_every_day(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training and of evaluation, months later, with one and the same hash."""
    tokenizer: Any = load_tokenizer(
        UNNAMED, saved(tmp_path, tokenizer_for(source_of(name) + "{# #}", pad_token="<pad>")), None
    )
    prompt = ConversationEncoder(tokenizer, tokenizer.template).encode_prompt(ONE[:1])
    assert tokenizer.template.date == "2024-07-26"
    assert "26 Jul 2024" in tokenizer.decode(prompt) or "2024-07-26" in tokenizer.decode(prompt)
    tokenizer.save_pretrained(tmp_path / "saved")
    later = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    text = later.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True)
    assert later(text, add_special_tokens=False)["input_ids"] == prompt
    assert "strftime_now(" not in later.chat_template
    assert choose_template(UNNAMED, tokenizer_for(CHATML)).date is None
