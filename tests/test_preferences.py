"""Preferences: rows with two answers, DPO from a run's adapter, and what proves that it is that."""

from __future__ import annotations

import io
import json
import math
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runs import answers, make_run
from kill_and_resume import outcome
from preflight_runs import changed, ready, verdict_of
from rich.console import Console

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.base.adapters import ADAPTER
from qlora_recipes.cli import main as cli
from qlora_recipes.commands.recipe_cli import parse
from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.errors import ComparisonError, DataError, RecipeError, UsageError
from qlora_recipes.evaluation.bar import Bar
from qlora_recipes.evaluation.harness import default_tasks
from qlora_recipes.evaluation.held_out import score_preferences
from qlora_recipes.evaluation.loaded import BaseKey, restore_base, restore_run
from qlora_recipes.formatters import RowError, preferences
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.preflight import OF_PREFERENCES, names
from qlora_recipes.preflight.preferences import mean_margins
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.signals import Stopped
from qlora_recipes.settings import resolve
from qlora_recipes.standins import ROWS
from qlora_recipes.training.build import prepare_rows
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import PreferenceTrainer

DOCS = Path(__file__).parent.parent / "docs" / "deploy.md"
STEPS = dict(
    max_steps=4, max_length=128, per_device_train_batch_size=2, gradient_accumulation_steps=1, warmup_steps=0,
    learning_rate=1e-2, save_strategy="no", logging_steps=1,
)  # fmt: skip
SLOW = ("answers_end", "gradient_after_evaluation", "starting_loss", "tokenizer_reloads")
ASKED, RIGHT, WRONG = "Who pays Anna?", "The Guild.", "The Town."
USER = {"role": "user", "content": ASKED}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    file.write_text("".join(ROWS["preferences"].read_text().splitlines(keepends=True)[:40]))
    return file


@pytest.fixture(scope="module")
def recipe(rows: Path) -> type[Recipe]:
    class Preferring(Recipe):
        model = LLAMA_2_7B_CHAT
        dataset = DatasetSpec(str(rows), held_out=0.2)
        method = "dpo"
        lora = dict(r=4)
        training = STEPS

    return Preferring


@pytest.fixture(scope="module")
def stages(
    recipe: type[Recipe],
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunFolder, RunFolder]:
    """A run that learned answers, and one that began with it and learned preferences."""
    root, quiet, model = tmp_path_factory.mktemp("runs"), Console(file=io.StringIO()), str(tiny("llama2"))
    first = resolve(recipe_for(), model=model, output_dir=root / "first", training={"learning_rate": 1e-2})
    train(first, skip_checks=names(first.recipe), console=quiet)
    second = resolve(recipe, model=model, from_run=root / "first", output_dir=root / "second")
    return RunFolder(root / "first"), train(second, skip_checks=SLOW, console=quiet)


# ---- Rows ----


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": RIGHT, "rejected": WRONG},
        {"prompt": [USER], "chosen": [said(RIGHT)], "rejected": [said(WRONG)]},
        {"prompt": ASKED, "chosen": [USER, said(RIGHT)], "rejected": [USER, said(WRONG)]},
        {"chosen": [USER, said(RIGHT)], "rejected": [USER, said(WRONG)]},
    ],
)
def test_the_usual_shapes_are_read(row: dict[str, Any]) -> None:
    assert preferences(row) == {"messages": [USER, said(RIGHT)], "rejected": WRONG}


def test_earlier_answers_are_outside_the_loss() -> None:
    before = [USER, said("Which Anna?"), {"role": "user", "content": "The tall one."}]
    found = preferences({"prompt": before, "chosen": RIGHT, "rejected": WRONG})
    assert found["messages"] == [USER, said("Which Anna?") | {"train": False}, before[2], said(RIGHT)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ASKED, "chosen": RIGHT, "rejected": RIGHT}, "are both 'The Guild.'"),
        ({"prompt": ASKED, "chosen": RIGHT}, "no 'rejected'|rejected"),
        ({"chosen": [USER, said(RIGHT)], "rejected": [{**USER, "content": "Why?"}, said(WRONG)]}, "before their last"),
        ({"prompt": ASKED, "chosen": 3, "rejected": WRONG}, "expected a text or a list of messages"),
        ({"chosen": RIGHT, "rejected": WRONG}, "chosen"),
    ],
)
def test_what_is_no_pair_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        preferences(row)


def test_both_answers_follow_one_prompt_and_a_row_that_is_cut_away_is_dropped(
    recipe: type[Recipe], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    pairs = [json.loads(line) for line in ROWS["preferences"].read_text().splitlines()[:10]]
    pairs[3]["prompt"] *= 30
    pairs[5]["rejected"] = pairs[5]["chosen"]
    file.write_text("\n".join(map(json.dumps, pairs)))
    run = prepare_rows(resolve(recipe, model=str(tiny("llama2")), dataset=str(file)))
    assert run.data.receipt.rows_dropped == {
        "no two answers to one prompt": 1,
        "no answer within max_length": 1,
    }
    row = run.data.train[0]
    asked, other = row.messages[:-1], [*row.messages[:-1], said(row.rejected)]
    prompt, chosen, rejected = row.pair.values()
    assert prompt + chosen == run.encoder.encode(row.messages).input_ids
    assert prompt + rejected == run.encoder.encode(other).input_ids
    assert prompt == run.encoder.encode_prompt(asked)
    assert run.data.receipt.contents["preferences"] == 8
    again = [{**pair, "rejected": f"{pair['rejected']} Perhaps."} for pair in pairs]
    file.write_text("\n".join(map(json.dumps, again)))
    other_rows = prepare_rows(resolve(recipe, model=str(tiny("llama2")), dataset=str(file)))
    assert other_rows.data.receipt.fingerprint != run.data.receipt.fingerprint


def test_a_formatter_of_your_own_returns_both_answers(
    recipe: type[Recipe], tiny: Callable[[str], Path], rows: Path
) -> None:
    class Own(recipe):
        def format_row(self, row: Any) -> dict[str, Any]:
            asked = {"role": "user", "content": row["prompt"]}
            return {"messages": [asked, said(row["chosen"])], "rejected": row["rejected"]}

    class One(recipe):
        def format_row(self, row: Any) -> list[dict[str, Any]]:
            return [{"role": "user", "content": row["prompt"]}, said(row["chosen"])]

    plain, own = (prepare_rows(resolve(each, model=str(tiny("llama2")))) for each in (recipe, Own))
    assert plain.data.receipt.fingerprint == own.data.receipt.fingerprint
    with pytest.raises(DataError, match="gave no messages and rejected"):
        prepare_rows(resolve(One, model=str(tiny("llama2"))))


# ---- Settings ----


def test_settings_are_those_of_dpo_config(recipe: type[Recipe]) -> None:
    assert "packing" not in recipe.training and recipe.lora["r"] == 4
    assert parse(recipe, ["--beta", "0.2"])["beta"] == 0.2
    with pytest.raises(UsageError, match="unknown flag --packing"):
        parse(recipe, ["--packing", "true"])
    with pytest.raises(UsageError, match="DPOConfig has no field 'packing'"):
        resolve(recipe, training={"packing": True})
    bare = type("Bare", (Recipe,), {"model": recipe.model, "dataset": recipe.dataset, "method": "dpo"})
    assert "packing" not in bare.training and bare.training["learning_rate"] == Recipe.training["learning_rate"]
    with pytest.raises(RecipeError, match="method: got 'ppo', expected one of sft, dpo"):
        type("Other", (recipe,), {"method": "ppo"})
    with pytest.raises(UsageError, match=r"training: beta: got 0\.0"):
        resolve(recipe, training={"beta": 0.0})


# ---- Training ----


def test_preferences_start_from_a_run_and_every_check_holds(stages: tuple[RunFolder, RunFolder]) -> None:
    first, second = (folder.receipt() for folder in stages)
    verdicts = {check.name: check.verdict for check in second.checks}
    proven = ("adapter_starts_at_base", "answers_alone", "reference_is_the_start", "trainer_keeps_the_loss")
    assert {verdicts[name] for name in (*proven, "base_unchanged", "adapter_reloads", "quantized_linears")} == {"pass"}
    [reference] = [check.figure for check in second.checks if check.name == "reference_is_the_start"]
    assert "a margin of 0 and a loss of 0.693147" in reference
    assert second.adapter.initial_sha256 == first.adapter.final_sha256 != second.adapter.final_sha256
    assert second.base.sha256 == first.base.sha256 and second.settings.method == "dpo"
    assert second.training.first_loss == pytest.approx(math.log(2), abs=1e-6)
    logged = [json.loads(line) for line in stages[1].metrics.read_text().splitlines()]
    margins = [line["rewards/margins"] for line in logged if "rewards/margins" in line]
    assert second.training.margins == [margins[0], margins[-1]] and margins[0] == 0 != margins[-1]
    assert second.training.supervised_tokens < second.training.tokens
    assert "TRL](https://github.com/huggingface/trl)'s DPOTrainer" in (stages[1].adapter / "README.md").read_text()
    assert {file.name for file in stages[1].adapter.iterdir()} == {file.name for file in stages[0].adapter.iterdir()}


def test_preferences_resume_to_the_same_bits(
    stages: tuple[RunFolder, RunFolder],
    recipe: type[Recipe],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, gradient_checkpointing=True)

    def go(folder: str, *, resume: bool = False) -> None:
        settings = resolve(
            recipe, model=str(tiny("llama2")), from_run=stages[0].path, training=steps, output_dir=tmp_path / folder
        )
        train(settings, resume=resume, skip_checks=names(recipe), console=Console(file=io.StringIO()))

    go("whole")
    plain = PreferenceTrainer.training_step

    def stop(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise Stopped(signal.SIGTERM, 2)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(PreferenceTrainer, "training_step", stop)
        go("stopped")
    go("stopped", resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_the_checks_find_another_start_and_other_words(
    recipe: type[Recipe], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = ready(recipe, tiny("llama2"), tmp_path)
    alone, reference = OF_PREFERENCES
    assert [verdict_of(check, run).verdict for check in OF_PREFERENCES] == ["pass", "pass"]
    row = replace(run.data.train[0], rejected="Something else.")
    wrong = verdict_of(alone, changed(run, data=replace(run.data, train=[row])))
    assert wrong.verdict == "fail" and "other words in the loss" in wrong.figure
    weight = next(weight for name, weight in run.model.named_parameters() if f"lora_B.{ADAPTER}" in name)
    with torch.no_grad():
        weight += 1
    moved = verdict_of(reference, run)
    assert moved.verdict == "fail" and "1 of its tensors differ" in moved.figure


def test_margins_are_means_of_the_first_and_the_last_tenth() -> None:
    assert mean_margins([{"rewards/margins": float(i)} for i in range(20)]) == [0.5, 18.5]
    assert mean_margins([{"loss": 1.0}]) == []


# ---- Evaluating and comparing ----


def test_held_out_preferences_are_scored_by_their_log_probabilities(stages: tuple[RunFolder, RunFolder]) -> None:
    folder = stages[1]
    receipt = folder.receipt()
    assert default_tasks(receipt)[:2] == ["held_out", "held_out_preferences"]
    key = BaseKey.of(receipt)
    with restore_run(folder, restore_base(key), key) as run:
        quiet = Bar("preferences", Console(quiet=True))
        with quiet.progress:
            scores = score_preferences(run, batch_size=3, limit=None, bar=quiet)
        assert len(scores.docs) == len(run.held_out) == receipt.data.rows_held_out
        for row, doc in zip(run.held_out, scores.docs, strict=True):
            *asked, chosen = row.messages
            better, worse = (log_probability(run, asked, text) for text in (chosen["content"], row.rejected))
            assert doc.score == float(better > worse)
    assert scores.metrics["acc"] == sum(doc.score for doc in scores.docs) / len(scores.docs)
    key = BaseKey.of(stages[0].receipt())
    with restore_run(stages[0], restore_base(key), key) as run, pytest.raises(DataError, match="one answer each"):
        score_preferences(run, batch_size=3, limit=None, bar=Bar("preferences", Console(quiet=True)))


@torch.no_grad()
def log_probability(run: Any, asked: Sequence[dict[str, Any]], answer: str) -> float:
    encoded = run.encoder.encode([*asked, said(answer)])
    logits = run.model(input_ids=torch.tensor([encoded.input_ids])).logits[0].float().log_softmax(-1)
    scored = [(i, label) for i, label in enumerate(encoded.labels) if label >= 0]
    return sum(float(logits[i - 1, label]) for i, label in scored)


def test_preferences_are_not_compared_with_answers(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "bf16", 0, answers(800))]
    one = RunFolder(runs[0]).receipt().settings
    runs.append(
        make_run(tmp_path, "nf4", 0, answers(800), receipt={"settings": replace(one, method="dpo")}),
    )
    with pytest.raises(ComparisonError, match=r"settings\.method: sft and dpo|settings\.method: dpo and sft"):
        compare_folders(runs, 1.0)


# ---- The page ----


def test_the_commands_of_the_page_learn_preferences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = DOCS.read_text(encoding="utf-8").split("\n## Preferences")[1].split("\n## ")[0]
    commands = re.findall(r"^qlora-recipes (train .*)$", section, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        cli([*command.split(), "--max_steps", "2", "--skip_checks", *SLOW])
    second = RunFolder(Path(commands[1].split("--output_dir ")[1].split()[0])).receipt()
    assert second.settings.method == "dpo" and second.start and second.start.receipt.settings.method == "sft"
