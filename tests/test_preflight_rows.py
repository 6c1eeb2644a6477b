"""What can be refused before a base is loaded: each fault is provoked, and refused in words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from preflight_runs import changed, read, verdict_of, with_data, with_rows
from tokenizers import AddedToken

from qlora_recipes import Recipe
from qlora_recipes.data import arrow_rows
from qlora_recipes.data.arrow_rows import Conversation, Rows
from qlora_recipes.data.encoding import IGNORED, ConversationEncoder, Encoded
from qlora_recipes.memory import ranks
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT, ModelSpec
from qlora_recipes.preflight import (
    BEFORE_LOADING,
    Run,
    loss,
    machine,
    prompts,
    run_checks,
    tokens,
)
from qlora_recipes.preflight import rows as row_checks

TOKENIZERS, DATA = os.environ.get("QLORA_RECIPES_TOKENIZERS"), os.environ.get("QLORA_RECIPES_DATA")
needs_real = pytest.mark.skipif(not TOKENIZERS or not DATA, reason="QLORA_RECIPES_TOKENIZERS or _DATA name no folder")


@pytest.fixture(params=["llama2", "falcon"])
def run(request: pytest.FixtureRequest, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]) -> Run:
    return read(recipe_for(request.param), tiny(request.param))


@pytest.fixture
def llama2(tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]) -> Run:
    return read(recipe_for("llama2"), tiny("llama2"))


def relabeled(run: Run, change: Callable[[Encoded], Encoded]) -> Run:
    """Return the run with its first training row changed."""
    first, *others = run.data.train
    return with_data(run, train=[replace(first, encoded=change(first.encoded)), *others])


def test_no_check_decodes_every_row(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file to the last check on rows; the few rows that some checks sample are looked up one at a time."""
    passes: list[int] = []
    decoded: list[str] = []
    iterate, decode = Rows.__iter__, arrow_rows._conversation

    def counted_pass(self: Rows) -> Iterator[Conversation]:
        passes.append(len(self))
        return iterate(self)

    def counted_row(place: str, *columns: Any, **named: Any) -> Conversation:
        decoded.append(place)
        return decode(place, *columns, **named)

    monkeypatch.setattr(Rows, "__iter__", counted_pass)
    monkeypatch.setattr(arrow_rows, "_conversation", counted_row)
    run = read(recipe_for("llama2"), tiny("llama2"))
    run_checks(BEFORE_LOADING, run)
    assert passes == []
    assert len(decoded) <= 50 + 200


def test_bundled_rows_pass_everything(run: Run) -> None:
    checks = run_checks(BEFORE_LOADING, run)
    assert {check.verdict for check in checks} <= {"pass", "warn"}
    assert [check.name for check in checks] == [check.__name__ for check in BEFORE_LOADING]
    of_few_rows = {"duplicates", "held_out_rows"}
    assert {check.name for check in checks if check.verdict == "warn"} <= of_few_rows


def test_a_question_in_the_loss_is_refused(run: Run) -> None:
    wrong = relabeled(run, lambda row: Encoded(row.input_ids, list(row.input_ids)))
    check = verdict_of(loss.loss_is_the_answers, wrong)
    assert check.verdict == "fail"
    assert run.data.train[0].place in check.figure
    assert "generation" in check.advice


def test_an_untrained_end_of_turn_is_refused(run: Run) -> None:
    wrong = relabeled(run, lambda row: Encoded(row.input_ids, [*row.labels[:-1], IGNORED]))
    check = verdict_of(loss.end_of_turn, wrong)
    assert check.verdict == "fail"
    assert run.tokenizer.eos_token in check.figure


def test_an_earlier_untrained_end_of_turn_is_refused(llama2: Run) -> None:
    several = next(row for row in llama2.data.train if len(row.messages) > 2)
    at = several.encoded.labels.index(llama2.tokenizer.eos_token_id)
    labels = [IGNORED if i == at else label for i, label in enumerate(several.encoded.labels)]
    wrong = replace(several, encoded=Encoded(several.encoded.input_ids, labels))
    run = with_data(llama2, train=[wrong])
    assert verdict_of(loss.end_of_turn, run).verdict == "fail"


def test_two_beginnings_of_text_are_refused(llama2: Run) -> None:
    bos = llama2.tokenizer.bos_token_id
    wrong = relabeled(llama2, lambda row: Encoded([bos, *row.input_ids], [IGNORED, *row.labels]))
    check = verdict_of(loss.beginning_of_text, wrong)
    assert check.verdict == "fail"
    assert "1 rows with two in a row" in check.figure


def test_a_row_that_starts_without_bos_is_refused(llama2: Run) -> None:
    wrong = relabeled(llama2, lambda row: Encoded(row.input_ids[1:], row.labels[1:]))
    assert verdict_of(loss.beginning_of_text, wrong).verdict == "fail"


def test_rows_without_a_supervised_token_are_refused(run: Run) -> None:
    wrong = relabeled(run, lambda row: Encoded(row.input_ids, [IGNORED] * len(row.labels)))
    assert verdict_of(loss.rows_without_loss, wrong).verdict == "fail"


def test_cut_answers_are_counted(tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]) -> None:
    run = read(recipe_for("llama2"), tiny("llama2"), training=dict(max_length=21))
    cut, lost = verdict_of(loss.answers_cut, run), verdict_of(loss.rows_without_loss, run)
    assert cut.verdict == "warn"
    assert "supervised tokens lost" in cut.figure and "--max_length" in cut.advice
    assert lost.verdict == "warn"
    assert verdict_of(loss.loss_is_the_answers, run).verdict == "pass"


def test_another_prompt_than_in_training_is_refused(run: Run) -> None:
    run.tokenizer.chat_template = run.tokenizer.chat_template.replace("Assistant:", "Answer:").replace(
        "[/INST]", "[INST]"
    )
    check = verdict_of(prompts.template_agrees, run)
    assert check.verdict == "fail"
    assert "prompts differ" in check.figure


def test_control_tokens_in_a_message_stay_text(run: Run) -> None:
    end, begin = run.tokenizer.eos_token, run.tokenizer.bos_token
    forging = with_rows(
        run, [(f"a {end}{begin} b {token}", f"c {end} d") for token in run.tokenizer.all_special_tokens]
    )
    forged, controls = verdict_of(prompts.forged_turns, forging), verdict_of(prompts.control_tokens, forging)
    assert forged.verdict == controls.verdict == "pass"
    assert f"{len(forging.data.train)} rows hold control tokens as text" in forged.figure


def test_added_tokens_in_a_message_stop_no_run(run: Run) -> None:
    """As `>>ANSWER<<` of Falcon's vocabulary, which is special but has no name, and as words that a user added."""
    special, word = AddedToken(">>ANSWER<<", special=True), AddedToken("<word>", special=False)
    run.tokenizer.add_tokens([special, word])
    encoder = ConversationEncoder(run.tokenizer, run.encoder.template)
    spelled = with_rows(changed(run, encoder=encoder), [("a >>ANSWER<< b", "c"), ("a <word> b", "c <word>")])
    of_prompts = (prompts.template_agrees, prompts.forged_turns, prompts.control_tokens)
    assert [verdict_of(check, spelled).verdict for check in (*of_prompts, loss.loss_is_the_answers)] == ["pass"] * 4
    first, second = (row.encoded.input_ids for row in spelled.data.train)
    assert run.tokenizer.convert_tokens_to_ids(">>ANSWER<<") not in first
    assert second.count(run.tokenizer.convert_tokens_to_ids("<word>")) == 2


def test_a_tokenizer_that_takes_text_for_control_tokens_is_refused(llama2: Run) -> None:
    row = llama2.data.train[0]
    text = llama2.tokenizer.apply_chat_template(row.messages, tokenize=False).replace("?", "? </s><s>")
    ids = llama2.tokenizer(text, add_special_tokens=False)["input_ids"]
    wrong = relabeled(llama2, lambda _: Encoded(ids, ids))
    check = verdict_of(prompts.control_tokens, wrong)
    assert check.verdict == "fail"
    assert row.place in check.figure


@pytest.mark.parametrize("spec", [LLAMA_2_7B_CHAT, FALCON_7B], ids=["llama2", "falcon"])
def test_a_template_without_role_markers_is_refused(
    spec: ModelSpec, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]
) -> None:
    run = read(recipe_for(spec.family), tiny(spec.family))
    careless = replace(spec.chat_template, role_markers="never-there")
    run = changed(run, encoder=ConversationEncoder(run.tokenizer, careless))
    check = verdict_of(prompts.forged_turns, run)
    assert check.verdict == "fail"
    assert "opens a turn" in check.figure and "role_markers" in check.advice


def test_a_padding_token_inside_a_row_is_refused(run: Run) -> None:
    pad = run.tokenizer.pad_token_id
    check = verdict_of(
        tokens.padding_token,
        relabeled(run, lambda row: Encoded([pad, *row.input_ids], [IGNORED, *row.labels])),
    )
    assert check.verdict == "fail"
    assert run.tokenizer.pad_token in check.figure


def test_unknown_tokens_are_counted(llama2: Run) -> None:
    unknown = llama2.tokenizer.unk_token_id
    wrong = relabeled(llama2, lambda row: Encoded([unknown] * 5000, [unknown] * 5000))
    assert verdict_of(tokens.unknown_tokens, wrong).verdict == "warn"


def test_spaces_that_merge_first_are_refused(llama2: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = {"a  b": ["▁a", "▁▁", "b"], " ": ["▁▁"], "a b": ["▁a", "▁b"]}
    monkeypatch.setattr(type(llama2.tokenizer), "tokenize", lambda self, text: pieces[text])
    check = verdict_of(prompts.spaces_as_pretrained, llama2)
    assert check.verdict == "fail"
    assert "merge_spaces_last" in check.advice
    pieces["a  b"] = ["▁a", "▁", "▁b"]
    assert verdict_of(prompts.spaces_as_pretrained, llama2).verdict == "pass"


def test_copies_are_counted(run: Run) -> None:
    copies = with_rows(run, [("What is it?", "A thing."), ("what is it", "a thing"), ("Who?", "She.")])
    check = verdict_of(row_checks.duplicates, copies)
    assert check.verdict == "warn"
    assert check.figure.startswith("1 of 3")


def test_answers_without_words_are_counted(run: Run) -> None:
    check = verdict_of(row_checks.short_answers, with_rows(run, [("Why?", "..."), ("Who?", "The two of them.")]))
    assert check.verdict == "warn"
    assert check.figure.startswith("1 of 2 answers without a word")


def test_held_out_rows_that_are_known_are_counted(run: Run) -> None:
    seen: list[Conversation] = run.data.train[:5]
    known = with_data(run, held_out=seen)
    check = verdict_of(row_checks.contamination, known)
    assert check.verdict == "warn"
    assert check.figure.startswith("5 of 5")
    fresh = with_rows(run, [("What color has a swan?", "White, if it was not born in Australia.")])
    known = with_data(run, held_out=fresh.data.train)
    assert verdict_of(row_checks.contamination, known).verdict == "pass"


@pytest.mark.parametrize(("count", "verdict"), [(0, "warn"), (19, "warn"), (20, "pass")])
def test_too_few_held_out_rows_are_warned_of(run: Run, count: int, verdict: str) -> None:
    few = with_data(run, held_out=[*run.data.train[:1]] * count)
    assert verdict_of(row_checks.held_out_rows, few).verdict == verdict


def test_dropped_rows_are_counted_by_reason(
    tmp_path: Path, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]
) -> None:
    rows = [{"question": f"Who is {i}?", "answer": "She."} for i in range(4)]
    bad = [{"question": "Who?", "answer": ""}, {"question": "User: x\nUser: y", "answer": "She."}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows + bad))
    run = read(recipe_for("falcon"), tiny("falcon"), dataset=str(file))
    check = verdict_of(row_checks.rows_dropped, run)
    assert check.verdict == "warn"
    assert "1 empty answer" in check.figure and "1 control string" in check.figure
    file.write_text(json.dumps(rows + bad * 3))
    assert (
        verdict_of(row_checks.rows_dropped, read(recipe_for("falcon"), tiny("falcon"), dataset=str(file))).verdict
        == "fail"
    )


def test_columns_that_are_not_read_are_named(
    tmp_path: Path, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]
) -> None:
    rows = [{"question": f"Who is {i}?", "answer": "She.", "context": "A room."} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = read(recipe_for("falcon"), tiny("falcon"), dataset=str(tmp_path / "rows.json"))
    check = verdict_of(row_checks.columns_unread, run)
    assert (check.verdict, check.figure) == ("warn", "left out of training: context (4)")
    assert "format_row" in check.advice


def test_row_lengths_are_drawn() -> None:
    assert row_checks.bars([1, 1, 1, 5, 9], count=3) == "█▄▄"
    assert row_checks.bars([7, 7]).startswith("█")


def test_a_folder_that_cannot_be_written_is_refused(run: Run, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    wrong = changed(run, settings=replace(run.settings, output_dir=blocked / "run"))
    check = verdict_of(machine.writable_folder, wrong)
    assert check.verdict == "fail"
    assert "--output_dir" in check.advice


def test_a_hub_out_of_reach_is_told_where_it_is_needed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.environment, "hub_answers", lambda: False)
    assert verdict_of(machine.hub, run).figure == "not needed"
    by_id = changed(run, settings=replace(run.settings, model="owner/model"))
    assert verdict_of(machine.hub, by_id).figure == "cannot be reached; owner/model came from the cache"


def test_too_little_memory_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = 1000

    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Free)
    check = verdict_of(machine.memory_free, run)
    assert check.verdict == "fail"
    assert "planned" in check.figure and "--max_length" in check.advice


def test_a_base_that_fsdp_divides_needs_no_room_for_all_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = ranks.planned(run.settings, "cpu", 8, divided=False).base - 1

    monkeypatch.setitem(PartialState()._shared_state, "num_processes", 8)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Free)
    assert verdict_of(machine.memory_free, run).verdict == "fail"
    monkeypatch.setattr(machine, "divides", lambda: True)
    assert verdict_of(machine.memory_free, run).verdict == "warn"


@pytest.mark.parametrize(
    ("changed", "found", "verdict", "told"),
    [
        ("", "", "warn", ""),
        ("_attn_implementation", "0000", "warn", "PreTrainedConfig, which training/build.py reads, has changed"),
        ("_attn_implementation", "absent", "fail", "PreTrainedConfig, which training/build.py reads, has changed"),
        ("_save", "0000", "fail", "_save of transformers.trainer.Trainer, which training/trainer.py replaces"),
    ],
)
def test_a_version_outside_is_a_warning_and_a_fail_where_what_is_replaced_has_changed(
    run: Run, monkeypatch: pytest.MonkeyPatch, changed: str, found: str, verdict: str, told: str
) -> None:
    asked, read = ["transformers>=99", "trl>=1"], machine.upstream.fingerprint
    monkeypatch.setattr(machine.environment.importlib.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(machine.upstream, "fingerprint", lambda name: found if name.name == changed else read(name))
    check = verdict_of(machine.versions, run)
    assert check.verdict == verdict
    assert check.figure.startswith("outside the tested versions: transformers 5.")
    assert "expected >=99" in check.figure and told in check.figure and "trl" not in check.figure
    assert ("has changed" in check.figure) == bool(changed)
    assert "plain_linears (5.23)" in check.advice and "pip install" in check.advice


@needs_real
@pytest.mark.parametrize(("family", "rows"), [("llama2", "guanaco_llama2.jsonl"), ("falcon", "ecommerce_faq.json")])
def test_real_rows_and_tokenizers_pass(family: str, rows: str, recipe_for: Callable[..., type[Recipe]]) -> None:
    recipe = recipe_for(family, training=dict(max_length=2048))
    run = read(recipe, Path(TOKENIZERS) / family, dataset=str(Path(DATA) / rows))
    assert {check.name: check.figure for check in run_checks(BEFORE_LOADING, run) if check.verdict != "pass"} == {}


@needs_real
@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_no_string_of_a_real_tokenizer_forges_a_turn(family: str, recipe_for: Callable[..., type[Recipe]]) -> None:
    rows = {"llama2": "guanaco_llama2.jsonl", "falcon": "ecommerce_faq.json"}
    run = read(recipe_for(family), Path(TOKENIZERS) / family, dataset=str(Path(DATA) / rows[family]))
    tokens = [
        token for token in run.tokenizer.get_vocab() if token.startswith(("<", ">>")) and token.endswith((">", "<<"))
    ]
    controls = set(run.tokenizer.get_added_vocab().values())
    plain = run.encoder.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    for token in tokens:
        said = [{"role": "user", "content": f"a {token}"}, {"role": "assistant", "content": f"{token} b"}]
        ids = run.encoder.encode(said).input_ids
        assert [i for i in ids if i in controls] == [i for i in plain.input_ids if i in controls], token
