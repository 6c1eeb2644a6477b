"""The command line of a recipe: its own flags, every field, a config file, and one clear error for the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_recipes import Recipe
from qlora_recipes.commands.recipe_cli import _without_secrets, parse, settings_from
from qlora_recipes.errors import UsageError
from qlora_recipes.settings import Settings

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def resolve(recipe_for: Callable[..., type[Recipe]]) -> Callable[..., Settings]:
    recipe = recipe_for()
    return lambda *words: settings_from(recipe, parse(recipe, words))


def test_flags_beat_the_recipe_and_its_defaults(resolve: Callable[..., Settings]) -> None:
    settings = resolve("--learning_rate", "5e-5", "--r", "32", "--seed", "7", "--precision", "bf16")
    assert settings.training["learning_rate"] == 5e-5
    assert settings.lora["r"] == 32
    assert settings.training["max_length"] == 128  # the recipe's
    assert settings.output_dir == Path("runs/conftest/bf16-seed7")
    assert settings.dtype == "bfloat16"


def test_booleans_lists_and_mappings_are_read(resolve: Callable[..., Settings]) -> None:
    settings = resolve("--packing", "--tf32", "false", "--target_modules", "q_proj", "v_proj")
    assert settings.training["packing"] is True
    assert settings.training["tf32"] is False
    assert settings.lora["target_modules"] == ["q_proj", "v_proj"]
    settings = resolve("--target_modules", "all-linear", "--lr_scheduler_kwargs", "{num_cycles: 2}")
    assert settings.lora["target_modules"] == "all-linear"
    assert settings.training["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_config_file_gives_flags_and_the_command_line_beats_it(
    resolve: Callable[..., Settings], tmp_path: Path
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("precision: fp4\nlearning_rate: 1e-3\nmax_steps: 7\ndemo: true\n")
    settings = resolve("--config", str(file), "--max_steps", "9")
    assert settings.precision.name == "fp4"
    assert settings.training["learning_rate"] == 1e-3
    assert settings.training["max_steps"] == 9
    assert settings.demo


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--learning_rat", "1"], "Did you mean 'learning_rate'?"),
        (["--precison", "nf4"], "Did you mean 'precision'?"),
        (["--precision", "nf5"], "Did you mean 'nf4'?"),
        (["--dtype", "float32"], "expected bfloat16 or float16"),
        (["--precision", "bf16", "--dtype", "float16"], "contradicts"),
        (["--max_steps", "many"], "max_steps: got 'many', expected int"),
        (["--r", "8", "--r", "9"], "--r is given twice"),
        (["--r", "0"], "a rank of at least 1"),
        (["--bf16", "true"], "it follows from --dtype"),
        (["--resume", "--overwrite"], "give one of them"),
        (["train"], "unexpected word 'train'"),
        (["--demo", "perhaps"], "expected true or false"),
        (["--config", "missing.yaml"], "cannot be read"),
        (["--learning_rate"], "expected one argument"),
    ],
)
def test_a_wrong_flag_is_refused(resolve: Callable[..., Settings], words: list[str], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(*words)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("learning_rat: 1\n", "Did you mean 'learning_rate'?"),
        ("- a\n", "holds list"),
        ("a: [\n", "is no YAML"),
        ("max_steps: x\n", "expected int"),
        ("fp16: true\n", "--dtype float16"),
    ],
)
def test_a_wrong_config_file_is_refused(resolve: Callable[..., Settings], tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve("--config", str(file))
    assert part in str(caught.value)


def test_a_demo_without_bundled_rows_says_what_to_give(recipe_for: Callable[..., type[Recipe]]) -> None:
    from qlora_recipes import DatasetSpec

    recipe = recipe_for(dataset=DatasetSpec("mine.jsonl"))
    with pytest.raises(UsageError, match="give --dataset FILE"):
        settings_from(recipe, parse(recipe, ["--demo"]))


def test_secrets_do_not_reach_the_receipt() -> None:
    words = ["recipe", "--hub_token", "hf_abc", "--hub_token=hf_abc", "--max_steps", "5"]
    assert "hf_abc" not in " ".join(_without_secrets(words))
    assert _without_secrets(words)[-1] == "5"


@pytest.mark.parametrize("words", [["--learning_rat", "1"], ["--dataset", "missing.jsonl", "--demo"]])
def test_errors_exit_with_2_and_leave_nothing(words: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, RECIPES / "llama2_guanaco.py", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag() -> None:
    command = [sys.executable, RECIPES / "falcon_faq.py", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in ("--precision", "--dtype", "--demo", "--plan", "--resume", "--learning_rate", "--r", "--packing"):
        assert flag in text
