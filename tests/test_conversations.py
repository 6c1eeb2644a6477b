"""Tools, reasoning, plain texts and weights: the mask is TRL's, and what a template leaves out is refused by row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from preflight_runs import changed, verdict_of
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.chat_templates import ChatTemplate
from qlora_recipes.data.encoding import IGNORED, ConversationEncoder
from qlora_recipes.data.figures import RowMeter
from qlora_recipes.data.prepare import prepare
from qlora_recipes.errors import DataError
from qlora_recipes.evaluation.held_out import _reference, hash_conversation
from qlora_recipes.evaluation.loaded import HeldOutRow
from qlora_recipes.formatters import Reason, RowError, before_last_answer, check_conversation
from qlora_recipes.models import ModelSpec
from qlora_recipes.preflight.loss import beginning_of_text, end_of_turn, loss_is_the_answers
from qlora_recipes.preflight.prompts import control_tokens, template_agrees
from qlora_recipes.settings import STANDIN, resolve
from qlora_recipes.stages import Prepared, Run
from qlora_recipes.standins import STANDINS

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be brief."}
USER = {"role": "user", "content": "Does it rain?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Örebro"}}}
    ],
}
THOUGHT = {"reasoning_content": "I must look it up."}
RESULT = {"role": "tool", "content": '{"rain": true}', "name": "weather", "tool_call_id": "abcdefghi"}
ANSWER = {"role": "assistant", "content": "Yes, it rains."}
ROWS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "plain": ([USER, ANSWER, USER, ANSWER], None),
    "system": ([SYSTEM, USER, ANSWER], None),
    "developer": ([DEVELOPER, USER, ANSWER], None),
    "tools": ([SYSTEM, USER, CALL, RESULT, ANSWER, USER, ANSWER], [TOOL]),
    "calls": ([USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}, RESULT, RESULT, ANSWER], [TOOL]),
    "call last": ([USER, CALL], [TOOL]),
    "reasoning": ([USER, ANSWER, USER, {**ANSWER, **THOUGHT}], None),
    "both": ([USER, {**CALL, **THOUGHT}, RESULT, {**ANSWER, **THOUGHT}], [TOOL]),
}
NO_TOOLS = ("tools", "calls", "call last", "both")
# Template of TRL to the rows of which it leaves something out.
LEAVES_OUT = {
    "qwen3": (),
    "qwen3_5_think": (),
    "glm4moe": (),
    "muse_glimmer": (),
    "gptoss": ("calls",),  # it renders the first of several
    "qwen2_5": ("reasoning", "both"),
    "llama3": (*NO_TOOLS, "reasoning"),
}
_ENCODERS: dict[str, ConversationEncoder] = {}


def encoder_for(name: str) -> ConversationEncoder:
    """Return an encoder with a template of TRL and a small tokenizer that has its special tokens."""
    if name not in _ENCODERS:
        source = (TEMPLATES / f"{name}_training.jinja").read_text()
        tokenizer = AutoTokenizer.from_pretrained(STANDINS["falcon"].folder)
        special = sorted(set(re.findall(r"<\|[^<>\n]{1,40}?\|>", source)))
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        words = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # which Qwen's tokenizers have as words
        tokenizer.add_tokens([AddedToken(word, special=False) for word in words if word in source])
        tokenizer.chat_template = source
        _ENCODERS[name] = ConversationEncoder(tokenizer, ChatTemplate(source, name, origin="trl"))
    return _ENCODERS[name]


@pytest.mark.parametrize("name", LEAVES_OUT)
def test_ids_and_mask_are_those_of_trl(name: str) -> None:
    encoder = encoder_for(name)
    for row, (messages, tools) in ROWS.items():
        said, checked = check_conversation({"messages": messages, "tools": tools})
        fate = encoder.fate(said, checked)
        assert bool(fate.left_out) == (row in LEAVES_OUT[name]), row
        encoded = encoder.encode(said, checked)
        reference = encoder.tokenizer.apply_chat_template(
            encoder.for_template(messages), tools=tools, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        assert encoded.input_ids == reference["input_ids"], row
        assert [int(label != IGNORED) for label in encoded.labels] == reference["assistant_masks"], row
        assert not fate.misplaced, row
        assert encoder.structure(said, checked) == encoder.control_tokens(encoded.input_ids), row


def test_what_is_left_out_is_named() -> None:
    messages, tools = ROWS["both"]
    assert encoder_for("llama3").fate(messages, tools).left_out == (
        "a call in message 1 (assistant)",
        "the arguments of a call in message 1 (assistant)",
        "the reasoning of message 3 (assistant)",
        "the tools",
    )
    twice = encoder_for("gptoss").fate([*ROWS["both"][0][:1], {**ANSWER, **THOUGHT}, *ROWS["reasoning"][0][-2:]])
    assert (twice.left_out, twice.forgotten) == ((), 1)  # of the turn before the last, on purpose


def test_a_developer_is_rendered_as_the_template_knows_it() -> None:
    system, developer = ROWS["system"][0], ROWS["developer"][0]
    assert encoder_for("gptoss").knows_developer and not encoder_for("qwen3").knows_developer
    assert encoder_for("qwen3").encode(developer) == encoder_for("qwen3").encode(system)


def test_a_turn_outside_the_loss_is_there_and_not_trained() -> None:
    encoder = encoder_for("qwen3")
    whole = encoder.encode([USER, ANSWER, USER, ANSWER])
    last = encoder.encode([USER, {**ANSWER, "train": False}, USER, ANSWER])
    assert last.input_ids == whole.input_ids and last.supervised == whole.supervised / 2
    assert encoder.tokenizer.decode([label for label in last.labels if label != IGNORED]).count("it rains") == 1


@pytest.mark.parametrize("text", ["<|im_end|>", "<tool_call>", "\ufdd0"])
@pytest.mark.parametrize("place", ["result", "argument", "key", "reasoning", "name", "schema"])
def test_no_text_of_a_message_becomes_a_part_of_the_template(place: str, text: str) -> None:
    forged = json.loads(json.dumps(ROWS["both"]))
    _, call, result, answer = forged[0]
    function, schema = call["tool_calls"][0]["function"], forged[1][0]["function"]
    places = {
        "result": (result, "content"),
        "argument": (function["arguments"], "city"),
        "key": (function["arguments"], f"a {text} b"),
        "reasoning": (answer, "reasoning_content"),
        "name": (function, "name"),
        "schema": (schema, "description"),
    }
    where, key = places[place]
    where[key] = f"a {text} b"
    encoder = encoder_for("qwen3")
    if text == "<|im_end|>":  # special, so that a text with it is encoded as the characters it is written with
        encoded = encoder.encode(*forged)
        assert encoder.control_tokens(encoded.input_ids) == encoder.structure(*forged)
        assert encoder.structure(*forged) == encoder.structure(*ROWS["both"])
    else:
        with pytest.raises(RowError) as caught:
            encoder.encode(*forged)
        assert caught.value.reason in (Reason.CONTROL_STRING, Reason.UNENCODABLE)


def test_a_plain_text_is_in_the_loss_between_bos_and_eos() -> None:
    text = [{"role": "text", "content": "Once upon a time <|endoftext|> there was."}]
    adds_bos = AutoTokenizer.from_pretrained(STANDINS["falcon"].folder)
    adds_bos.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", adds_bos.bos_token_id)]
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    for tokenizer, bos in ((adds_bos, [adds_bos.bos_token_id]), (encoder_for("qwen3").tokenizer, [])):
        encoded = ConversationEncoder(tokenizer, encoder_for("qwen3").template).encode(text)
        assert [token for token in encoded.input_ids[:1] if token in bos] == bos
        assert encoded.input_ids[-1] == tokenizer.eos_token_id and encoded.input_ids.count(tokenizer.eos_token_id) == 1
        assert "Once upon a time <|endoftext|> there was." in tokenizer.decode(encoded.input_ids)
        assert encoded.labels == [IGNORED, *encoded.input_ids[1:]]


def test_the_prompt_of_a_conversation_is_what_comes_before_the_last_turn_in_the_loss() -> None:
    assert before_last_answer([USER, ANSWER, USER, {**ANSWER, "train": False}]) == [USER]
    assert before_last_answer(ROWS["tools"][0]) == ROWS["tools"][0][:-1]
    assert before_last_answer([{"role": "text", "content": "a"}]) == []
    assert _reference(HeldOutRow("", [USER, CALL])) == "weather\ncity\nÖrebro"
    plain, with_tools = (HeldOutRow("", [USER, ANSWER], tools) for tools in (None, [TOOL]))
    assert hash_conversation(plain) != hash_conversation(with_tools)


# ---- Rows of a run ----


@pytest.fixture
def run(tmp_path: Path, recipe_for: Callable[..., type[Recipe]]) -> Callable[..., Run]:
    """Return a function that prepares rows with the Qwen3 template."""

    def make(*rows: Any, name: str = "qwen3", **spec: Any) -> Run:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        datasets = spec.pop("datasets", None) or DatasetSpec(str(file), **{"held_out": 0.0, **spec})
        settings = resolve(recipe_for(dataset=datasets), training=dict(max_length=4096))
        encoder = encoder_for(name)
        return Run(Prepared(settings, encoder.tokenizer, encoder, prepare(settings, encoder)))

    return make


def rows_of(*names: str) -> list[dict[str, Any]]:
    return [{"messages": ROWS[name][0], **({"tools": ROWS[name][1]} if ROWS[name][1] else {})} for name in names]


def test_rows_with_everything_pass_the_checks_and_are_counted(run: Callable[..., Run]) -> None:
    text = {"messages": [{"role": "text", "content": "Once upon a time."}]}
    it = run(*rows_of(*ROWS), text, {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]})
    receipt = it.data.receipt
    assert (receipt.rows_used, receipt.rows_dropped) == (len(ROWS) + 2, {})
    assert receipt.contents == {
        "user": 13, "assistant": 16, "system": 2, "developer": 1, "tool": 4, "rows with tools": 4, "calls": 5,
        "reasoning": 3, "assistant outside the loss": 1, "text": 1,
    }  # fmt: skip
    for check in (loss_is_the_answers, beginning_of_text, end_of_turn, control_tokens, template_agrees):
        assert verdict_of(check, it).verdict == "pass", verdict_of(check, it)
    read = next(row for row in it.data.train if row.tools)
    assert read.tools == [TOOL] and read.encoded == it.encoder.encode(read.messages, read.tools)


def test_a_control_token_in_a_row_that_no_turn_needs_is_found(run: Callable[..., Run]) -> None:
    it = run(*rows_of("both"))
    row = it.data.train[0]
    extra = it.tokenizer.convert_tokens_to_ids("<|im_start|>")
    encoded = replace(row.encoded, input_ids=[*row.encoded.input_ids, extra], labels=[*row.encoded.labels, IGNORED])
    figures = RowMeter(it.encoder).measure([replace(row, encoded=encoded)])
    it = changed(it, data=replace(it.data, figures=figures))
    assert verdict_of(control_tokens, it).verdict == "fail"


def test_the_fingerprint_follows_the_tools(run: Callable[..., Run]) -> None:
    with_tools, without = {"messages": [USER, ANSWER], "tools": [TOOL]}, {"messages": [USER, ANSWER]}
    rows = (with_tools, without, {**without, "tools": []})
    assert len({run(row).data.receipt.fingerprint for row in rows}) == 2


def test_rows_that_a_template_cannot_express_are_dropped_with_the_reason(run: Callable[..., Run]) -> None:
    data = run(*rows_of(*ROWS), name="llama3").data
    assert data.receipt.rows_dropped == {Reason.LEFT_OUT: 5}
    assert data.receipt.rows_used == 3
    with pytest.raises(DataError, match="llama3 does not render the reasoning of message 3"):
        run(*rows_of("reasoning"), name="llama3")


def test_a_template_that_refuses_a_row_drops_it_in_its_own_words(run: Callable[..., Run]) -> None:
    row = {"messages": [SYSTEM, USER, ANSWER]}
    assert run(*rows_of("plain"), row, name="gemma").data.receipt.rows_dropped == {Reason.TEMPLATE: 1}
    with pytest.raises(DataError, match="System role not supported"):
        run(row, name="gemma")


def test_reasoning_inside_an_answer_is_split_off(run: Callable[..., Run]) -> None:
    inside = {"role": "assistant", "content": "<think>\nI must look it up.\n</think>\n\nYes, it rains."}
    assert run({"messages": [USER, inside]}).data.train[0].messages[1] == {**ANSWER, **THOUGHT}
    assert run({"messages": [USER, inside]}, name="llama3").data.train[0].messages[1] == inside
    empty = {"role": "assistant", "content": "<think> Hm. </think>"}
    assert run({"messages": [USER, empty]}, *rows_of("plain")).data.receipt.rows_dropped == {Reason.EMPTY_ANSWER: 1}


def test_reasoning_in_the_content_is_an_answer_of_a_template_without_a_place_for_it(run: Callable[..., Run]) -> None:
    """As SmolLM3's, whose vocabulary has the tags as words, and whose template has a switch for thinking."""
    tokenizer: Any = load_tokenizer(ModelSpec("smollm3"), STANDIN + "smollm3", None)
    _ENCODERS["smollm3"] = ConversationEncoder(tokenizer, tokenizer.template)
    inside = {"role": "assistant", "content": "<think>\nI must look it up.\n</think>\n\nYes, it rains."}
    quoting = {"role": "assistant", "content": "It begins with <think> and ends with </think>."}
    nested = {"role": "assistant", "content": "<think> a <think> b </think> c"}
    asking = {"role": "user", "content": "<think> a </think> b"}
    rows = [{"messages": each} for each in ([USER, inside], [USER, quoting], [USER, nested], [asking, ANSWER])]
    made = run(*rows, {"messages": [USER, inside, USER, inside]}, name="smollm3")
    assert made.data.receipt.rows_dropped == {Reason.CONTROL_STRING: 3}
    first, _ = made.data.train
    assert first.messages == [USER, inside]
    in_loss = [label for label in first.encoded.labels if label != IGNORED]
    assert inside["content"] + "<|im_end|>" in tokenizer.decode(in_loss)
    for check in (loss_is_the_answers, end_of_turn, control_tokens, template_agrees):
        assert verdict_of(check, made).verdict == "pass", verdict_of(check, made)


def test_an_answer_with_its_reasoning_may_come_before_the_next_question() -> None:
    """As `chat` has it, whose answers hold what a model thought."""
    encoder = encoder_for("qwen3")
    earlier = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    text = encoder.spelled(encoder.render([USER, earlier, USER], add_generation_prompt=True).text)
    assert text.count("</think>") == 1 and "Yes." in text
    with pytest.raises(RowError, match="'<think>'"):
        encoder.encode_prompt([USER, {**earlier, "content": "Hm. <think>"}, USER])


def test_a_system_prompt_of_a_dataset_is_for_rows_without_one(run: Callable[..., Run]) -> None:
    rows = [*rows_of("plain", "system", "developer"), {"messages": [{"role": "text", "content": "Once."}]}]
    train = run(*rows, system=" Be kind. ").data.train
    firsts = [row.messages[0]["content"] for row in train]
    assert firsts == ["Be kind.", "Be brief.", "Be brief.", "Once."]


# ---- Several datasets ----


@pytest.fixture
def several(tmp_path: Path) -> tuple[str, str]:
    """Return two files with 400 rows and 40 others."""
    files = []
    for name, count in (("a", 400), ("b", 40)):
        files.append(tmp_path / f"{name}.jsonl")
        rows = ({"question": f"{name} {i}?", "answer": f"Number {i}."} for i in range(count))
        files[-1].write_text("\n".join(map(json.dumps, rows)))
    return str(files[0]), str(files[1])


def test_a_share_is_drawn_the_same_each_time_and_counted(run: Callable[..., Run], several: tuple[str, str]) -> None:
    a, b = several
    specs = [DatasetSpec(a, share=0.25, held_out=0.1), DatasetSpec(b, held_out=0.5)]
    it = run(datasets=specs)
    first, second = it.data.receipt.datasets
    assert it.data.receipt.source == it.settings.dataset_name == "a.jsonl (0.25) + b.jsonl"
    assert 75 < first.rows_in < 125 and first.rows_held_out == -(-first.rows_in // 10)
    assert (second.rows_in, second.rows_used, second.rows_held_out) == (40, 20, 20)
    assert first.tokens + second.tokens == it.data.receipt.tokens
    assert first.rows_used + second.rows_used == it.data.receipt.rows_used == len(it.data.train)
    assert {row.place.split(",")[0] for row in it.data.train} == {"a.jsonl", "b.jsonl"}
    again = run(datasets=specs).data.receipt
    assert again == it.data.receipt
    more = {row.place for row in run(datasets=[DatasetSpec(a, share=0.5, held_out=0)]).data.train}
    places = [row.place for rows in (it.data.train, it.data.held_out) for row in rows]
    drawn = {place.removeprefix("a.jsonl, ") for place in places if place.startswith("a.jsonl")}
    assert drawn < more  # a larger share only adds rows


def test_a_question_of_two_datasets_stays_on_one_side(run: Callable[..., Run], several: tuple[str, str]) -> None:
    a, b = several
    copies = Path(a).with_name("c.jsonl")
    copies.write_text(Path(b).read_text())
    data = run(datasets=[DatasetSpec(b, held_out=0.5), DatasetSpec(str(copies), held_out=0.0)]).data
    asked = [{row.messages[0]["content"] for row in side} for side in (data.train, data.held_out)]
    assert len(data.held_out) == 40 and not asked[0] & asked[1]


def test_a_dataset_on_the_command_line_replaces_all(
    several: tuple[str, str], recipe_for: Callable[..., type[Recipe]]
) -> None:
    recipe = recipe_for(dataset=[DatasetSpec("a.jsonl", share=0.5), DatasetSpec("b.jsonl")])
    (spec,) = resolve(recipe, dataset=several[1]).datasets
    assert (spec.source, spec.share) == (several[1], 1.0)


def test_a_share_that_draws_nothing_says_so(run: Callable[..., Run], several: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"a share of 1e-06 draws no row of .*b\.jsonl"):
        run(datasets=[DatasetSpec(several[1], share=1e-6)])


def test_arguments_of_other_tools_that_arrow_fills_in_are_left_out(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from qlora_recipes.data.reading import read_rows

    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"x": 1}, {"y": [None, 2]})]
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}], "tools": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    ((_, read),) = read_rows(str(tmp_path / "rows.parquet"))
    assert read == {"messages": [USER, {"role": "assistant", "tool_calls": calls}], "tools": None}
