"""A run that starts from another run's adapter: what it takes from it, what it proves of it, and what is refused."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runs import answers, flipped, make_run, receipt
from kill_and_resume import outcome
from rich.console import Console

from qlora_recipes import Recipe
from qlora_recipes.base.adapters import WEIGHTS
from qlora_recipes.cli import main as cli
from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.errors import CheckError, ComparisonError, RecipesError, RunFolderError, UsageError
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.preflight import names
from qlora_recipes.report.card import model_card
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt, StartReceipt
from qlora_recipes.run.signals import Stopped
from qlora_recipes.run.weights import adapter_file_sha256
from qlora_recipes.settings import Settings, resolve
from qlora_recipes.training.build import prepare_rows
from qlora_recipes.training.train import train
from qlora_recipes.training.trainer import RunTrainer

RecipeFor = Callable[..., type[Recipe]]
SLOW = ("answers_end", "gradient_after_evaluation", "packing_leak", "starting_loss", "tokenizer_reloads")
FIRST = {
    "plain": {"r": 6, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
DOCS = Path(__file__).parent.parent / "docs" / "deploy.md"


@pytest.fixture(scope="module")
def settings_for(tiny: Callable[[str], Path], recipe_for: RecipeFor) -> Callable[..., Settings]:
    def make(folder: Path, training: dict[str, Any] | None = None, **choices: Any) -> Settings:
        steps = dict(learning_rate=1e-2, warmup_steps=0, **(training or {}))
        return resolve(recipe_for(), **{"model": str(tiny("llama2"))} | choices, training=steps, output_dir=folder)

    return make


def go(settings: Settings, *, resume: bool = False, skip: Sequence[str] = SLOW) -> RunFolder:
    return train(settings, resume=resume, skip_checks=skip, console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def first(
    settings_for: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], RunFolder]:
    """Return a function that trains a first stage, once."""
    made: dict[str, RunFolder] = {}

    def make(name: str) -> RunFolder:
        if name not in made:
            folder = tmp_path_factory.mktemp("first") / name
            made[name] = go(settings_for(folder, lora=FIRST[name]), skip=names(Recipe))
        return made[name]

    return make


@pytest.mark.parametrize("name", FIRST)
def test_a_run_goes_on_with_the_adapter_of_another(
    name: str, first: Callable[[str], RunFolder], settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = first(name)
    was = folder.receipt()
    made = go(settings_for(tmp_path / "second", {"seed": 7}, from_run=folder.path)).receipt()
    assert made.start == folder.as_start() and made.start.receipt == was and len(made.start.sha256) == 64
    assert made.adapter.initial_sha256 == was.adapter.final_sha256 != made.adapter.final_sha256
    assert made.settings.lora == was.settings.lora and made.adapter.ranks == was.adapter.ranks
    assert made.base.sha256 == was.base.sha256 and made.precision == was.precision == "nf4"
    [start] = [check for check in made.checks if check.name == "adapter_starts_at_base"]
    assert start.verdict == "pass" and was.adapter.final_sha256[:12] in start.figure
    assert was.adapter.final_sha256[:16] in model_card(made) and "began with" not in model_card(was)
    third = go(settings_for(tmp_path / "third", {"seed": 7}, from_run=tmp_path / "second"), skip=names(Recipe))
    assert third.receipt().start.receipt.start.receipt == was


def test_another_precision_is_taken_when_it_is_said_and_is_a_warning(
    first: Callable[[str], RunFolder], settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = first("plain")
    made = go(settings_for(tmp_path / "second", from_run=folder.path, precision="bf16")).receipt()
    assert made.adapter.initial_sha256 == folder.receipt().adapter.final_sha256
    [start] = [check for check in made.checks if check.name == "adapter_starts_at_base"]
    assert start.verdict == "warn" and "trained on nf4" in start.figure


def test_a_base_that_has_changed_is_refused_before_training(
    first: Callable[[str], RunFolder], settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path / "second", from_run=first("plain").path)
    was = settings.start.receipt
    start = replace(settings.start, receipt=replace(was, base=replace(was.base, sha256="another")))
    with pytest.raises(CheckError, match=r"adapter_starts_at_base: .*that was another.*\. The base has changed"):
        go(replace(settings, start=start))
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"lora": {"r": 4}}, r"--r: got 4, and the adapter of .*plain has 6\. Leave it out"),
        ({"lora": {"target_modules": ["q_proj"]}}, "--target_modules: got"),
        ({"lora": {"use_dora": True}}, "--use_dora: got True, and the adapter of .* has None"),
        ({"model": "standin-llama2"}, r"got the base standin-llama2, expected the one that its .* --model /"),
        ({"lora": {"revision": "0" * 40}}, "got the base .* at 0000"),
    ],
)
def test_what_contradicts_the_first_run_is_refused(
    choices: dict[str, Any],
    message: str,
    first: Callable[[str], RunFolder],
    settings_for: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=message):
        settings_for(tmp_path / "second", from_run=first("plain").path, **choices)


def test_the_flags_of_the_first_run_may_be_given_again(
    first: Callable[[str], RunFolder], settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    again = {"r": 6, "target_modules": ["v_proj", "q_proj"], "use_dora": False}
    settings = settings_for(tmp_path / "second", from_run=first("plain").path, lora=again)
    assert settings.lora == first("plain").receipt().settings.lora


def test_the_first_run_is_not_replaced(
    first: Callable[[str], RunFolder], settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(first("plain").path)
    with pytest.raises(UsageError, match="the new run would replace it"):
        settings_for(tmp_path / "link", from_run=first("plain").path)


def test_an_unfinished_first_run_is_refused(settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no finished run: run\.json is missing"):
        settings_for(tmp_path / "second", from_run=tmp_path)


def test_another_template_or_a_damaged_adapter_is_refused_before_anything_is_loaded(
    first: Callable[[str], RunFolder],
    settings_for: Callable[..., Settings],
    tmp_path: Path,
    tiny: Callable[[str], Path],
    recipe_for: RecipeFor,
) -> None:
    template = replace(LLAMA_2_7B_CHAT.chat_template, source=LLAMA_2_7B_CHAT.chat_template.source + " ")
    other = recipe_for(model=replace(LLAMA_2_7B_CHAT, chat_template=template))
    with pytest.raises(UsageError, match="got the chat template"):
        prepare_rows(resolve(other, model=str(tiny("llama2")), from_run=first("plain").path))
    copy = tmp_path / "copy"
    (copy / "adapter").mkdir(parents=True)
    (copy / "run.json").write_bytes((first("plain").path / "run.json").read_bytes())
    settings = settings_for(tmp_path / "second", from_run=copy)
    for content, message in ((None, "cannot be read"), (first("dora"), "are another run's or damaged")):
        if content is not None:
            (copy / "adapter" / WEIGHTS).write_bytes((content.adapter / WEIGHTS).read_bytes())
        with pytest.raises(RecipesError, match=message):
            prepare_rows(settings)


def test_a_second_stage_resumes_to_the_same_bits(
    first: Callable[[str], RunFolder],
    settings_for: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = dict(max_steps=4, save_strategy="steps", save_steps=2)

    def second(folder: str, *, resume: bool = False, start: str = "plain") -> None:
        settings = settings_for(tmp_path / folder, steps, from_run=first(start).path)
        go(settings, resume=resume, skip=names(settings.recipe))

    second("whole")
    plain = RunTrainer.training_step

    def stop(self: RunTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise Stopped(signal.SIGTERM, 2)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RunTrainer, "training_step", stop)
        second("stopped")
    with pytest.raises(RunFolderError, match="from run: was"):
        second("stopped", resume=True, start="pissa")
    second("stopped", resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


# ---- Comparing ----


def started(precision: str, start: Receipt, seed: int = 0) -> dict[str, Any]:
    """Changes to the receipt of a run that began with the adapter of another."""
    own = StartReceipt(f"runs/first/{start.precision}-seed{start.seed}", "sha256", start)
    return {"start": own, "adapter__initial_sha256": start.adapter.final_sha256}


def compared(root: Path, starts: dict[str, list[Receipt]]) -> Any:
    scores, folders = answers(800), []
    for precision, of_seeds in starts.items():
        for seed, start in enumerate(of_seeds):
            changes = started(precision, start)
            folders.append(make_run(root, precision, seed, flipped(scores, 4, 4), receipt=changes))
    return compare_folders(folders, 1.0)


def test_arms_that_start_from_one_adapter_are_compared(tmp_path: Path) -> None:
    start = receipt("nf4", 5)
    facts = {fact.name: fact.figure for fact in compared(tmp_path, {"nf4": [start], "bf16": [start]}).validity}
    assert "in every precision" in facts["adapter before training"] and "both trainings" not in facts["started from"]


def test_arms_that_go_on_with_their_own_first_runs_are_compared_as_a_whole(tmp_path: Path) -> None:
    starts = {name: [receipt(name, seed) for seed in (0, 1)] for name in ("nf4", "bf16")}
    facts = {fact.name: fact.figure for fact in compared(tmp_path, starts).validity}
    assert "in every precision" not in facts["adapter before training"]
    assert facts["started from"].endswith("a difference is one of both trainings")
    assert "adapter.initial_sha256" not in facts["receipts"]


@pytest.mark.parametrize(
    ("nf4", "bf16", "message"),
    [
        ([receipt("nf4", 0)], [receipt("bf16", 0, data__fingerprint="f2")], r"start\.receipt\.data\.fingerprint"),
        ([receipt("nf4", 0)], [receipt("bf16", 1)], r"start\.receipt\.seed"),
        ([receipt("bf16", 0)], [receipt("bf16", 1)], r"start\.run: runs/first/bf16-seed1 and runs/first/bf16-seed0"),
        ([receipt("nf4", 0), receipt("bf16", 1)], [receipt("bf16", 0), receipt("bf16", 1)], "from two with others"),
    ],
)
def test_first_runs_that_differ_in_more_than_precision_are_refused(
    tmp_path: Path, nf4: list[Receipt], bf16: list[Receipt], message: str
) -> None:
    with pytest.raises(ComparisonError, match=message):
        compared(tmp_path, {"bf16": bf16, "nf4": nf4})


def test_a_receipt_that_contradicts_its_chain_or_has_none_is_refused(tmp_path: Path) -> None:
    changes = started("nf4", receipt("nf4", 5))
    plain = make_run(tmp_path, "bf16", 0, answers(800))
    nf4 = make_run(tmp_path, "nf4", 0, answers(800), receipt=changes)
    with pytest.raises(ComparisonError, match="start: "):
        compare_folders([plain, nf4], 1.0)
    edited = make_run(tmp_path / "edited", "nf4", 0, answers(800), receipt=changes | {"adapter__initial_sha256": "a"})
    with pytest.raises(ComparisonError, match="began with the adapter a, and runs/first/nf4-seed5"):
        compare_folders([plain, edited], 1.0)


# ---- The page ----


def test_the_commands_of_the_page_make_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = DOCS.read_text(encoding="utf-8").split("\n## Go on")[1].split("\n## ")[0]
    commands = re.findall(r"^qlora-recipes (train .*--demo.*)$", section, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        cli([*command.split(), "--max_steps", "2", "--skip_checks", *SLOW])
    folder = RunFolder(Path(commands[1].split("--output_dir ")[1].split()[0]))
    second, stored = folder.receipt(), json.loads((folder.path / "run.json").read_text())
    assert second.start.run == commands[1].split("--from_run ")[1].split()[0] == stored["start"]["run"]
    file = RunFolder(Path(second.start.run)).adapter / WEIGHTS
    assert adapter_file_sha256(file) == second.adapter.initial_sha256
