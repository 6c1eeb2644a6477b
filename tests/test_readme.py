"""The READMEs tell the truth: their commands exist, their paths exist, and the planned memory is the plan's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qlora_recipes import load_recipe, preflight
from qlora_recipes.cli import VERBS
from qlora_recipes.commands.recipe_cli import parse, settings_from
from qlora_recipes.memory.estimate import plan
from qlora_recipes.precision import precision_named

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
GIB = 2**30
_GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, object]] = {
    "meta-llama/Llama-3.1-8B-Instruct": {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"vocab_size": 128256, **_GROUPED},
    },
    "Qwen/Qwen3-8B": {
        **{"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
        **{"vocab_size": 151936, **_GROUPED},
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        **{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"vocab_size": 32768, **_GROUPED},
    },
    "google/gemma-3-1b-it": {
        **{"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
        **{"vocab_size": 262144, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
        **{"sliding_window": 512, "tie_word_embeddings": True},
    },
    "HuggingFaceTB/SmolLM3-3B": {
        **{"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
        **{"vocab_size": 128256, "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True},
    },
    "unsloth/gpt-oss-20b-BF16": {
        **{"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24},
        **{"vocab_size": 201088, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64},
        **{"num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "tie_word_embeddings": False},
    },
}
"""What the config.json of each model says of its sizes."""


def recipe_commands(text: str) -> list[str]:
    return re.findall(r"accelerate launch (recipes/\S+\.py.*)", text)


@pytest.mark.parametrize("command", recipe_commands(README) + recipe_commands(RECIPES))
def test_every_recipe_command_is_understood(command: str) -> None:
    path, *flags = command.split("#")[0].split()
    recipe = load_recipe(ROOT / path)
    if "--config" not in flags:  # the reader's own file
        settings_from(recipe, parse(recipe, flags))


@pytest.mark.parametrize("text", [README, RECIPES], ids=["README.md", "recipes/README.md"])
def test_links_and_pictures_are_there(text: str) -> None:
    folder = ROOT if text is README else ROOT / "recipes"
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_the_rooms_are_there() -> None:
    rooms = re.findall(r"^    (\w+)/ ", README.split("## Layout")[1], flags=re.MULTILINE)
    assert set(rooms) >= {"recipes", "qlora_recipes", "eval", "tests"}
    assert all((ROOT / room).is_dir() for room in rooms)


def test_the_verbs_are_those_of_the_command() -> None:
    line = re.search(r"`qlora-recipes` has (.*?)\.\n", README, flags=re.DOTALL)
    assert line is not None
    assert set(re.findall(r"`(\w+)`", line.group(1))) == set(VERBS)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_the_planned_memory_is_the_plans(path: Path, tmp_path: Path) -> None:
    row = next(line for line in RECIPES.splitlines() if f"[{path.stem}]" in line)
    shown = [float(figure) for figure in row.split("|")[-2].split("/")]
    recipe = load_recipe(path)
    flags = []
    if recipe.model.sizes is None:  # found from the hub's config.json, which is written here: there is no network
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[recipe.model.hub_id]))
        flags = ["--model", str(tmp_path)]
    settings = settings_from(recipe, parse(recipe, flags))
    planned = [plan(settings, precision_named(name)).training.total / GIB for name in ("nf4", "bf16")]
    assert shown == pytest.approx(planned, abs=0.06)


def test_the_recipe_in_the_readme_is_one(tmp_path: Path) -> None:
    source = re.search(r"(    from qlora_recipes import.*?)    if __name__", README, flags=re.DOTALL)
    assert source is not None
    lines = [line[4:] for line in source.group(1).splitlines()]
    assert len([line for line in lines if line.strip()]) <= 10
    (tmp_path / "tickets.py").write_text("\n".join(lines))
    recipe = load_recipe(tmp_path / "tickets.py")
    assert [m["role"] for m in recipe.formatter()({"subject": "a", "reply": "b"})] == ["user", "assistant"]


def test_the_checks_are_as_many_as_the_readme_says() -> None:
    figures = re.search(
        r"(\d+) checks: (\d+) before the base is loaded, (\d+) before the first step, and (\d+) after", README
    )
    assert figures is not None
    stages = preflight.BEFORE_LOADING, preflight.BEFORE_TRAINING, [*preflight.AFTER_TRAINING, *preflight.AFTER_SAVING]
    counts = [len(stage) for stage in stages]
    assert [int(figure) for figure in figures.groups()] == [sum(counts), *counts]
