"""What is checked after training and how checks are run: recorded, skipped, agreed on, and refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from preflight_runs import read, verdict_of, with_data
from rich.console import Console

from qlora_recipes import Recipe
from qlora_recipes.base.adapters import WEIGHTS
from qlora_recipes.commands.recipe_cli import parse
from qlora_recipes.errors import CheckError, RecipeError, UsageError
from qlora_recipes.preflight import (
    GROUPS,
    Run,
    check_names,
    fail_unless,
    machine,
    names,
    print_checks,
    print_groups,
    refuse_failed,
    run_checks,
    trained,
)
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import AdapterReceipt, Check, MemoryReceipt
from qlora_recipes.settings import resolve
from qlora_recipes.stages import Trained
from qlora_recipes.training.train import prepare_run, train

Tiny = Callable[[str], Path]
RecipeFor = Callable[..., type[Recipe]]
LEARNS = dict(max_steps=4, learning_rate=1e-2, warmup_steps=0, save_strategy="no")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture
def run(tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path) -> Run:
    """Train three steps and save, as `train` does."""
    settings = resolve(recipe_for("llama2"), model=str(tiny("llama2")), output_dir=tmp_path, training=LEARNS)
    prepared, _ = prepare_run(settings, console=quiet())
    prepared.trainer.train()
    folder = RunFolder(tmp_path)
    prepared.trainer.save_model(str(folder.unproven))
    weights = sum(weight.numel() for weight in prepared.model.parameters() if weight.requires_grad)
    receipt = AdapterReceipt([], 14, weights, "float32", "", "", all_finite=True, unchanged=[], bytes=0)
    memory = MemoryReceipt(0, 0, 0, planned_bytes=None)
    return replace(prepared, trained=Trained(receipt, folder, memory))


def test_a_sound_adapter_passes_and_says_something(run: Run) -> None:
    checks = run_checks(
        [trained.losses_finite, trained.adapter_finite, trained.adapter_changed, trained.loss_fell], run
    )
    checks += run_checks([trained.optimizer_state_kept, trained.base_unchanged, trained.adapter_reloads], run)
    checks += run_checks([trained.tokenizer_reloads, trained.answers_end], run)
    assert {check.name: check.figure for check in checks if check.verdict == "fail"} == {}
    said = json.loads(run.folder.answers.read_text())
    assert [set(answer) for answer in said] == [{"place", "question", "answer", "expected", "ended"}] * len(said)


def test_a_weight_that_is_not_finite_is_refused(run: Run) -> None:
    run.adapter.all_finite = False
    check = verdict_of(trained.adapter_finite, run)
    assert check.verdict == "fail"
    assert "--learning_rate" in check.advice


def test_a_tensor_that_did_not_move_is_refused(run: Run) -> None:
    run.adapter.unchanged = ["layers.0.q_proj.lora_A.default.weight"]
    assert verdict_of(trained.adapter_changed, run).verdict == "warn"
    run.adapter.unchanged += ["layers.0.q_proj.lora_B.default.weight"]
    check = verdict_of(trained.adapter_changed, run)
    assert check.verdict == "fail"
    assert "target_modules" in check.advice


def test_a_loss_that_is_not_finite_is_refused(run: Run) -> None:
    run.trainer.state.log_history.append({"step": 9, "loss": 1.0, "grad_norm": float("nan")})
    check = verdict_of(trained.losses_finite, run)
    assert check.verdict == "fail"
    assert "grad_norm of step 9" in check.figure


def test_a_loss_that_rose_is_warned_of(run: Run) -> None:
    run.trainer.state.log_history = [{"step": i, "loss": 1.0 + i} for i in range(20)]
    check = verdict_of(trained.loss_fell, run)
    assert check.verdict == "warn"
    assert check.figure.startswith("1.500 to 19.500")


def test_a_base_that_changed_is_refused(run: Run) -> None:
    run.model.get_input_embeddings().weight.data[0, 0] += 1
    check = verdict_of(trained.base_unchanged, run)
    assert check.verdict == "fail"
    assert "became" in check.figure


def test_an_optimizer_state_that_is_not_finite_is_refused(run: Run) -> None:
    state = next(iter(run.trainer.optimizer.optimizer.state.values()))
    state["exp_avg"].fill_(float("nan"))
    assert verdict_of(trained.optimizer_state_kept, run).verdict == "fail"


def test_another_adapter_on_disk_is_refused(run: Run) -> None:
    from safetensors.torch import load_file, save_file

    file = run.folder.unproven / WEIGHTS
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    check = verdict_of(trained.adapter_reloads, run)
    assert check.verdict == "fail"
    assert check.figure.startswith("logits moved by")
    assert run.model.active_adapter == "default"


def test_another_template_on_disk_is_refused(run: Run) -> None:
    file = run.folder.unproven / "chat_template.jinja"
    file.write_text(file.read_text() + "\n{# another #}")
    check = verdict_of(trained.tokenizer_reloads, run)
    assert check.verdict == "fail"
    assert "trained with" in check.figure


def test_another_tokenizer_on_disk_is_refused(run: Run) -> None:
    row = next(row for row in run.data.train if not row.truncated)
    moved = [token + 1 for token in row.encoded.input_ids]
    run = with_data(run, train=[replace(row, encoded=replace(row.encoded, input_ids=moved))])
    check = verdict_of(trained.tokenizer_reloads, run)
    assert check.verdict == "fail"
    assert "other ids" in check.figure


def test_no_answer_that_ends_is_warned_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its words, which are no part of the receipt: that is published, and held-out rows are not."""
    monkeypatch.setattr(trained, "_ask", lambda *_: [{"answer": "and so on", "ended": False}])
    check = verdict_of(trained.answers_end, run)
    assert check.verdict == "warn"
    assert check.figure == "0 of 1 within 64 tokens"


def test_empty_answers_have_not_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, said = {"answer": "", "ended": True}, {"answer": "Yes.", "ended": True}
    monkeypatch.setattr(trained, "_ask", lambda *_: [empty, empty])
    check = verdict_of(trained.answers_end, run)
    assert check.verdict == "warn"
    assert check.figure.startswith("0 of 2 within 64 tokens, 2 without a word")
    monkeypatch.setattr(trained, "_ask", lambda *_: [empty, said])
    check = verdict_of(trained.answers_end, run)
    assert check.verdict == "pass"
    assert check.figure.startswith("1 of 2 within 64 tokens, 1 without a word")


def test_nothing_to_ask_is_not_a_pass(run: Run) -> None:
    check = verdict_of(trained.answers_end, with_data(run, held_out=[]))
    assert (check.verdict, check.figure) == ("untested", "not tested: no held-out row to ask")


def test_a_peak_is_tested_only_where_a_process_cannot_hide_it(run: Run) -> None:
    def verdict(taken: float, planned: float) -> str:
        memory = MemoryReceipt(0, 0, round(taken * 2**30), round(planned * 2**30))
        return verdict_of(machine.peak_as_planned, replace(run, trained=replace(run.trained, memory=memory))).verdict

    assert verdict_of(machine.peak_as_planned, run).verdict == "untested"  # it has no plan
    assert verdict(0.96, planned=0.08) == "untested"  # twelve times the plan
    assert verdict(0.05, planned=0.08) == "untested"
    assert verdict(1.2, planned=0.08) == "warn"
    assert verdict(10.9, planned=10) == "pass"
    assert verdict(12.1, planned=10) == "warn"


def test_a_part_that_a_run_has_not_reached_is_named(tiny: Tiny, recipe_for: RecipeFor) -> None:
    prepared = read(recipe_for("llama2"), tiny("llama2"))
    for name, part in {"model": "loaded model", "trainer": "trainer", "adapter": "trained adapter"}.items():

        def early(run: Run, name: str = name) -> Check:
            return fail_unless(bool(getattr(run, name)), "there", "")

        check = verdict_of(early, prepared)
        assert check.verdict == "fail"
        assert f"the run has no {part} yet" in check.figure


def never(run: Run) -> Check:
    return fail_unless(False, "0 of 1", "Do it once.")


def test_the_preflight_changes_nothing_and_the_receipt_has_it_all(
    tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    recipe = recipe_for("llama2", lora=dict(r=4, lora_dropout=0.1))
    runs = {}
    for skip in ([], names(recipe)):
        folder = tmp_path / f"skip{len(skip)}"
        settings = resolve(recipe, model=str(tiny("llama2")), output_dir=folder, training=LEARNS)
        runs[len(skip)] = train(settings, skip_checks=skip, console=quiet()).receipt()
    checked, unchecked = runs[0], runs[len(names(recipe))]
    assert checked.adapter.final_sha256 == unchecked.adapter.final_sha256
    assert [check.name for check in checked.checks] == names(recipe)
    assert {check.verdict for check in checked.checks} <= {"pass", "warn", "untested"}
    # a plan of a few MiB, where a process grows by more of its own
    assert [check.name for check in checked.checks if check.verdict == "untested"] == ["peak_as_planned"]
    assert {check.verdict for check in unchecked.checks} == {"off"}


def test_a_failed_check_stops_the_run_and_nothing_is_written(tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path) -> None:
    console, folder = quiet(), tmp_path / "run"
    settings = resolve(recipe_for("llama2", checks=(never,)), model=str(tiny("llama2")), output_dir=folder)
    with pytest.raises(CheckError, match=r"never: 0 of 1\. Do it once\."):
        train(settings, console=console)
    assert not folder.exists()
    assert "fail never" in console.file.getvalue()
    prepare_run(settings, skip_checks=["never"], console=console)


def test_a_check_that_crashes_is_a_fail_that_says_how_to_go_without() -> None:
    def broken(run: object) -> Check:
        raise KeyError("nothing")

    check = run_checks([broken], None)[0]
    assert check.verdict == "fail"
    assert "KeyError" in check.figure and "--skip_checks broken" in check.advice
    with pytest.raises(CheckError, match="broken"):
        refuse_failed([check])


def test_a_misspelt_check_is_refused(recipe_for: RecipeFor) -> None:
    with pytest.raises(UsageError, match="Did you mean 'packing_leak'"):
        check_names(["packing_leek"], names(recipe_for("llama2", checks=(never,))))
    check_names(["never"], names(recipe_for("llama2", checks=(never,))))


def test_checks_to_skip_are_named_on_the_command_line(recipe_for: RecipeFor, tmp_path: Path) -> None:
    recipe = recipe_for("llama2")
    assert parse(recipe, ["--skip_checks", "steps", "hub", "--r", "8"])["skip_checks"] == ["steps", "hub"]
    (tmp_path / "flags.yaml").write_text("skip_checks: [steps]\n")
    assert parse(recipe, ["--config", str(tmp_path / "flags.yaml")])["skip_checks"] == ["steps"]
    (tmp_path / "flags.yaml").write_text("skip_checks: steps\n")
    with pytest.raises(UsageError, match="expected a list"):
        parse(recipe, ["--config", str(tmp_path / "flags.yaml")])


def test_checks_that_are_none_are_refused_with_the_recipe(recipe_for: RecipeFor) -> None:
    with pytest.raises(RecipeError, match="expected a list of functions"):
        recipe_for("llama2", checks=("packing",))


def test_the_table_fits_80_columns_and_takes_words_as_they_are() -> None:
    console = quiet()
    checks = [
        Check("a_check", "pass", "[/INST] " * 30),
        Check("another_check", "warn", "1 of 2", "Look."),
        Check("third", "off", "turned off"),
        Check("fourth", "untested", "not tested: no plan"),
    ]
    print_checks(checks, "Checks", console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("[/INST]") for line in lines) == 30
    assert lines[-1] == "1 pass, 1 warn (another_check), 1 untested (fourth), 1 off (third)"


def test_checks_are_shown_by_group_and_what_is_no_pass_in_full() -> None:
    console = Console(file=io.StringIO(), width=80)
    checks = [
        Check("duplicates", "warn", "1 of 2", "Look."),
        Check("row_lengths", "pass", "9"),
        Check("mine", "pass", ""),
    ]
    print_groups(checks, "Before", console, GROUPS)
    shown = console.file.getvalue()
    assert "Before: 2 pass, 1 warn (duplicates)" in shown
    assert "rows   row_lengths" in shown and "recipe mine" in shown
    assert "warn duplicates: 1 of 2. Look." in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_fault_of_one_process_stops_all_of_them(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import os\n"
        "from accelerate import PartialState\n"
        "from qlora_recipes.preflight import fail_unless, run_checks\n"
        "PartialState(cpu=True)\n"
        "def odd(run): return fail_unless(os.environ['RANK'] == '0', 'rank ' + os.environ['RANK'], '')\n"
        "check = run_checks([odd], None)[0]\n"
        "open('seen' + os.environ['RANK'], 'w').write(check.verdict + ' ' + check.figure)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    assert [(tmp_path / f"seen{rank}").read_text() for rank in (0, 1)] == ["fail rank 1"] * 2
