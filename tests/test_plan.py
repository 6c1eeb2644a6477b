"""What `--plan` and `qlora-recipes plan` print, and how soon."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from qlora_recipes import cli
from qlora_recipes.commands import plan
from qlora_recipes.errors import UsageError
from qlora_recipes.memory import table
from qlora_recipes.memory.estimate import Memory
from qlora_recipes.memory.table import print_plan
from qlora_recipes.settings import resolve

RECIPES = Path(__file__).parent.parent / "recipes"


def printed(settings, **kwargs) -> str:
    output = io.StringIO()
    print_plan(settings, console=Console(width=80, file=output), **kwargs)
    return output.getvalue()


def test_the_plan_says_what_would_run(recipe_for):
    text = printed(resolve(recipe_for(), output_dir="runs/elsewhere"))
    for word in (
        "6,738,415,616",
        "2 rows = 2 a micro-batch x 1 accumulated x 1 process",
        "rank 4",
        "runs/elsewhere",
    ):
        assert word in text


def test_every_precision_stands_beside_the_others_in_80_columns(recipe_for):
    text = printed(resolve(recipe_for()), gpu_gib=24)
    for precision in ("nf4", "nf4-single", "fp4", "int8", "bf16", "fp16"):
        assert precision in text
    assert "rows in 22 GiB" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_gpu_as_it_is_sold_is_planned_as_pytorch_reports_it(recipe_for):
    sold, reported = printed(resolve(recipe_for()), gpu_gib=24), printed(resolve(recipe_for()), gpu_gib=22)
    said = "PyTorch reports as little as 22 GiB of cards that are sold with 24 GB."
    assert said in " ".join(sold.split())
    assert "sold" not in reported
    assert [line for line in sold.splitlines() if "rows in" in line] == [
        line for line in reported.splitlines() if "rows in" in line
    ]


def test_every_part_has_a_label():
    assert set(table._LABELS) == set(Memory("").parts)


def test_the_same_global_batch_in_larger_micro_batches(recipe_for):
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    text = printed(resolve(recipe_for(), training=training), gpu_gib=80)
    assert "--per_device_train_batch_size 16 --gradient_accumulation_steps 1" in " ".join(text.split())


def test_what_does_not_fit_is_said(recipe_for):
    assert "Not one row fits 2 GiB" in printed(resolve(recipe_for()), gpu_gib=2)
    with pytest.raises(UsageError, match="such as 24"):
        printed(resolve(recipe_for()), gpu_gib=0)


def test_a_demo_is_planned_for_this_machine(recipe_for, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    text = printed(resolve(recipe_for(), demo=True))
    assert "CPU, MiB" in text
    assert "CUDA context" not in text


def test_names_are_printed_as_they_are(recipe_for):
    settings = resolve(recipe_for(), output_dir="[/INST][bold]", dataset="[/INST]rows")
    assert "[/INST][bold]" in printed(settings)
    assert "[/INST]rows" in printed(settings)


def test_one_voice_for_all_processes(recipe_for, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert printed(resolve(recipe_for())) == ""


def test_processes_of_a_launch_are_counted(recipe_for, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "4 rows = 2 a micro-batch x 1 accumulated x 2 processes" in printed(resolve(recipe_for()))


def test_what_is_not_counted_is_said(recipe_for):
    assert "Not counted: use_dora." in printed(resolve(recipe_for(), lora={"use_dora": True}))


def test_the_command_takes_the_flags_of_the_recipe(capsys):
    plan.main([str(RECIPES / "llama2_guanaco.py"), "--gpu", "24", "--precision", "bf16", "--r", "8"])
    output = capsys.readouterr().out
    assert "rank 8" in output
    assert "rows in 22 GiB" in output


@pytest.mark.parametrize("words", [["missing.py"], [str(RECIPES / "falcon_faq.py"), "--presision", "nf4"]])
def test_a_wrong_command_is_one_message(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", *words])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error:")


def test_it_answers_at_once_and_without_torch():
    code = (
        "import sys; from qlora_recipes.commands.plan import main; main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    begun = time.perf_counter()
    words = [sys.executable, "-c", code, str(RECIPES / "falcon_faq.py"), "--gpu", "24"]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    assert time.perf_counter() - begun < 2
