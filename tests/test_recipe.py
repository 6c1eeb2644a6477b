"""A recipe is checked when its class body ends, with every fault in one message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_recipes import DatasetSpec, Recipe, load_recipe
from qlora_recipes.errors import RecipeError, UsageError
from qlora_recipes.fields import fields_of
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.recipe import check_field

WHOLE = {"model": LLAMA_2_7B_CHAT, "dataset": DatasetSpec("rows.jsonl")}


def declare(**attributes: object) -> type[Recipe]:
    return type("Mine", (Recipe,), {**WHOLE, **attributes})


def test_every_fault_is_in_one_message() -> None:
    with pytest.raises(RecipeError) as caught:
        type("Broken", (Recipe,), {"lora": {"rank": 8}, "training": {"learning_rat": 1, "max_steps": "many"}})
    message = str(caught.value)
    for part in (
        "model: missing",
        "dataset: missing",
        "LoraConfig has no field 'rank'",
        "Did you mean 'learning_rate'?",
        "max_steps: got 'many', expected int",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("attributes", "part"),
    [
        ({"lora": {"r": 0}}, "r: got 0, expected a rank of at least 1"),
        ({"lora": {"lora_dropout": 1.0}}, "lora_dropout: got 1.0, expected a probability below 1"),
        ({"training": {"learning_rate": -1e-4}}, "learning_rate: got -0.0001, expected a positive number"),
        ({"training": {"bf16": True}}, "bf16 is not set by hand; it follows from --dtype bfloat16"),
        ({"training": {"push_to_hub": True}}, "push_to_hub is not set by hand; it follows from qlora-recipes push RUN"),
        ({"training": [1]}, "training: got [1], expected a dict of SFTConfig fields"),
        ({"model": 7}, 'model: got 7, expected a hub id or a folder, such as "Qwen/Qwen3-8B", or a ModelSpec'),
        (
            {"dataset": 7},
            'dataset: got 7, expected a file or a hub id, such as "my_rows.jsonl", a DatasetSpec, or a list',
        ),
        ({"dataset": DatasetSpec("a", format_row="guanaco")}, "expected a function from row to messages"),
        ({"dataset": DatasetSpec("a", held_out=1.0)}, "dataset.held_out: got 1.0"),
        ({"dataset": DatasetSpec("a", share=0)}, "dataset.share: got 0, expected the share of its rows to use"),
        ({"dataset": DatasetSpec("a", system=" ")}, "dataset.system: got ' ', expected the words of a system prompt"),
        ({"dataset": []}, "dataset: got []"),
        ({"dataset": ["a", 3]}, "dataset: got [DatasetSpec"),
        ({"dataset": [DatasetSpec("a"), DatasetSpec("b", share=1.5)]}, "dataset[1].share: got 1.5"),
        ({"dataset": [DatasetSpec("a"), DatasetSpec("a")]}, "dataset[1]: a (split train) is in the list twice"),
        ({"trainning": {}}, "trainning: a recipe has no such attribute. Did you mean 'training'?"),
        ({"format_row": "question"}, "format_row: got 'question', expected a function"),
        ({"eval_tasks": "mmlu"}, "eval_tasks: got 'mmlu', expected a list"),
    ],
)
def test_a_fault_says_what_was_got_and_wanted(attributes: dict[str, object], part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        declare(**attributes)
    assert part in str(caught.value)


def test_a_variant_states_only_what_it_changes() -> None:
    base = declare(lora={"r": 64}, training={"learning_rate": 1e-4})
    variant = type("Variant", (base,), {"training": {"max_length": 512}})
    assert variant.lora["r"] == 64
    assert variant.training["learning_rate"] == 1e-4
    assert variant.training["max_length"] == 512
    assert base.training["max_length"] == Recipe.training["max_length"]


def test_format_row_may_be_written_with_or_without_self() -> None:
    class Plain(Recipe):
        model, dataset = WHOLE["model"], WHOLE["dataset"]

        def format_row(row):
            return [row]

    class Method(Recipe):
        model, dataset = WHOLE["model"], WHOLE["dataset"]

        def format_row(self, row):
            return [row]

    assert Plain.formatter()({"a": 1}) == Method.formatter()({"a": 1}) == [{"a": 1}]


def test_own_format_row_beats_the_datasets() -> None:
    spec = DatasetSpec("rows.jsonl", format_row=lambda row: ["dataset"])
    assert declare(dataset=spec).formatter()({}) == ["dataset"]
    assert declare(dataset=spec, format_row=staticmethod(lambda row: ["own"])).formatter()({}) == ["own"]


def test_fields_are_those_of_the_installed_classes() -> None:
    import dataclasses

    from peft import LoraConfig
    from trl import SFTConfig

    for name, config in (("SFTConfig", SFTConfig), ("LoraConfig", LoraConfig)):
        real = {field.name for field in dataclasses.fields(config) if field.init}
        assert real - set(fields_of(name)) <= {"peft_version", "auto_mapping"}  # PEFT fills these in itself
        added = {"early_stopping_patience", "loraplus_lr_ratio"}  # ours, among theirs
        assert set(fields_of(name)) - added <= {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("config", "name", "value", "checked"),
    [
        ("SFTConfig", "learning_rate", "2e-4", 2e-4),  # YAML reads it as a string
        ("SFTConfig", "max_steps", 5, 5),
        ("SFTConfig", "run_name", 7, "7"),
        ("SFTConfig", "lr_scheduler_type", "cosine", "cosine"),
        ("SFTConfig", "eval_steps", None, None),
        ("LoraConfig", "target_modules", ["q_proj"], ["q_proj"]),
        ("LoraConfig", "target_modules", "all-linear", "all-linear"),
        ("LoraConfig", "init_lora_weights", "gaussian", "gaussian"),
    ],
)
def test_values_take_the_type_of_their_field(config: str, name: str, value: object, checked: object) -> None:
    assert check_field(config, name, value) == checked


@pytest.mark.parametrize(("name", "value"), [("max_steps", True), ("max_steps", 1.5), ("packing", "maybe")])
def test_a_value_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        check_field("SFTConfig", name, value)


def write_recipe(path: Path, body: str) -> Path:
    path.write_text(
        "from qlora_recipes import DatasetSpec, Recipe\nfrom qlora_recipes.models import LLAMA_2_7B_CHAT\n\n"
        "class Mine(Recipe):\n    model = LLAMA_2_7B_CHAT\n    dataset = DatasetSpec('rows.jsonl')\n" + body,
        encoding="utf-8",
    )
    return path


def test_load_recipe_takes_the_most_derived_class(tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "mine.py", "\n\nclass Variant(Mine):\n    lora = dict(r=8)\n")
    assert load_recipe(file).__name__ == "Variant"


def test_load_recipe_refuses_what_declares_none_or_several(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe at"):
        load_recipe(tmp_path / "missing.py")
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match="declares none"):
        load_recipe(tmp_path / "none.py")
    two = write_recipe(tmp_path / "two.py", "\nclass A(Mine): pass\n\nclass B(Mine): pass\n")
    with pytest.raises(UsageError, match="declares A, B"):
        load_recipe(two)


def test_a_broken_recipe_file_ends_in_one_message_and_exit_code_2(tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "mine.py", "    lora = dict(r=0)\n\nMine.main()\n")
    result = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "a rank of at least 1" in result.stderr
    assert "Traceback" not in result.stderr
