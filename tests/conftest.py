"""Small models of the real architectures, built in process; no test reaches a network."""

from __future__ import annotations

import gc
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("QLORA_RECIPES_TEST_GPU", "")

from collections.abc import Callable
from pathlib import Path

from qlora_recipes.commands.quick_imports import quick_imports

with quick_imports():  # what they make is then not looked through each time that memory is released
    import qlora_recipes.evaluation.lm_eval_model
    import qlora_recipes.training.train  # noqa: F401

import pytest
import torch
from small_models import small  # noqa: F401  # a fixture

from qlora_recipes import DatasetSpec, Recipe, environment
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT, ModelSpec
from qlora_recipes.standins import ROWS, STANDINS

FAMILIES = {"llama2": LLAMA_2_7B_CHAT, "falcon": FALCON_7B}
torch.set_num_threads(1)  # two test processes share two cores
gc.set_threshold(100_000, 20, 20)  # as every command does (commands/entry.py)
environment.share_threads = lambda: None  # which would take them all


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a random two-layer model of a family, with the stand-in's tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


def make_tiny(family: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(STANDINS[family].folder)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 64, 2, 4
    if family == "llama2":
        config.intermediate_size, config.num_key_value_heads, config.head_dim = 128, 4, 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STANDINS[family].folder, **FAMILIES[family].tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., type[Recipe]]:
    """Return a function that makes a recipe of a family that trains in seconds; keyword arguments override it."""
    rows = {"llama2": "guanaco_llama2", "falcon": "faq"}
    folder = tmp_path_factory.mktemp("rows")
    guanaco, faq = folder / "guanaco.jsonl", folder / "faq.json"
    guanaco.write_text("".join(ROWS["guanaco_llama2"].read_text().splitlines(keepends=True)[:40]))
    faq.write_text(json.dumps({"questions": json.loads(ROWS["faq"].read_text())["questions"][:40]}))
    files = {"llama2": guanaco, "falcon": faq}

    def make(family: str = "llama2", **attributes: object) -> type[Recipe]:
        spec: ModelSpec = FAMILIES[family]
        declared = {
            "model": spec,
            "dataset": DatasetSpec(str(files[family]), demo=rows[family]),
            "lora": dict(r=4),
            "training": dict(
                max_steps=3,
                max_length=128,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=1,
                save_strategy="no",
            ),
            "__module__": __name__,
        }
        return type("TestRecipe", (Recipe,), {**declared, **attributes})

    return make
