"""Every recipe in recipes/ is found by itself, stays a declaration, and trains on its stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_recipes import load_recipe
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import recipe_name, resolve
from qlora_recipes.training.train import train

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
LAUNCHED = {"llama2_guanaco", "llama2_attention_only", "falcon_faq", "falcon_guanaco"}
"""Trained as their users do; the others in this process, which takes less time."""


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_declaration_that_the_table_lists(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    recipe = load_recipe(path)
    assert len(source.splitlines()) < 40
    assert source.startswith('"""')
    assert recipe_name(recipe) == path.stem
    assert recipe.dataset.demo
    assert f"[{path.stem}]({path.name})" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in LAUNCHED], ids=lambda path: path.stem)
def test_a_recipe_trains_on_its_stand_in(path: Path, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    quiet = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    result = run(*launch, *quiet, path, "--demo", "--max_steps", "4", "--output_dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    receipt = RunFolder(tmp_path / "run").receipt()
    quantized = receipt.base.quantized
    assert quantized.found == quantized.expected > 0
    assert receipt.precision == "nf4"
    assert receipt.training.steps == 4
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem not in LAUNCHED], ids=lambda path: path.stem)
def test_a_recipe_of_today_trains_on_its_stand_in(path: Path, tmp_path: Path) -> None:
    settings = resolve(load_recipe(path), demo=True, output_dir=tmp_path / "run", training={"max_steps": 4})
    receipt = train(settings, command=["test"]).receipt()
    quantized = receipt.base.quantized
    assert quantized.found == quantized.expected > 0
    assert receipt.training.steps == 4
    assert receipt.data.rows_dropped == {}


def test_ten_lines_anywhere_train_on_data_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "tickets.csv").write_text("subject,reply\n" + "".join(f"Ticket {i},Reply {i}.\n" for i in range(30)))
    (tmp_path / "tickets.py").write_text(
        "from qlora_recipes import DatasetSpec, Recipe\n"
        "from qlora_recipes.models import LLAMA_2_7B_CHAT\n\n"
        "class Tickets(Recipe):\n"
        "    model = LLAMA_2_7B_CHAT\n"
        "    dataset = DatasetSpec('tickets.csv')\n\n"
        "    def format_row(self, row):\n"
        "        return [{'role': 'user', 'content': row['subject']},\n"
        "                {'role': 'assistant', 'content': row['reply']}]\n\n"
        "Tickets.main()\n"
    )
    words = ["--demo", "--dataset", "tickets.csv", "--max_steps", "4", "--precision", "bf16"]
    result = run("tickets.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    receipt = RunFolder(tmp_path / "runs" / "tickets-demo" / "bf16-seed0").receipt()
    assert receipt.data.rows_in == 30
    assert receipt.data.rows_dropped == {}
