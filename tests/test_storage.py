"""Weights packed, expanded and in blocks: the same numbers, the same run, told apart by the receipt alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_recipes import Recipe
from qlora_recipes.base.adapters import attach
from qlora_recipes.base.loading import base_sha256, load_base
from qlora_recipes.kernels.blocked import is_available
from qlora_recipes.kernels.dequantize import dequantized, expand, is_4bit, weight_of
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT
from qlora_recipes.precision import precision_named
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train

needs_bfloat16 = pytest.mark.skipif(not is_available(), reason="this processor does not multiply in bfloat16")
Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
LINEARS = {"llama2": LLAMA_2_7B_CHAT.linear_layers, "falcon": FALCON_7B.linear_layers}
ATTENTION = {"llama2": ("q_proj", "v_proj"), "falcon": ("query_key_value",)}


def model_of(folder: Path, precision: str, *, expanded: bool, targets: tuple[str, ...]) -> PeftModel:
    base, _, _ = load_base(str(folder), None, precision_named(precision), "bfloat16", device=CPU)
    if expanded:
        expand(base, torch.bfloat16)
    model = attach(base, {"r": 4, "lora_alpha": 8, "target_modules": list(targets)}, 0)
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05, generator=draw)
    return model


def of_a_pass(model: PeftModel) -> dict[str, torch.Tensor]:
    ids = torch.arange(20, 80)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"logits": found.logits.detach(), **gradients}


@pytest.mark.parametrize("family", LINEARS)
@pytest.mark.parametrize("precision", ["nf4", "nf4-single", "fp4"])
@pytest.mark.parametrize("targets", [LINEARS, ATTENTION], ids=["all linears", "attention alone"])
def test_expanded_weights_give_the_same_bits(
    tiny: Tiny, family: str, precision: str, targets: dict[str, tuple[str, ...]]
) -> None:
    packed, expanded = (
        of_a_pass(model_of(tiny(family), precision, expanded=each, targets=targets[family])) for each in (False, True)
    )
    assert packed.keys() == expanded.keys()
    for name, part in packed.items():
        assert torch.equal(part, expanded[name]), name
        assert part.any()


@pytest.mark.parametrize("family", LINEARS)
def test_every_4_bit_linear_is_expanded_and_its_packed_weight_stays(tiny: Tiny, family: str) -> None:
    base, receipt, _ = load_base(str(tiny(family)), None, precision_named("nf4"), "bfloat16", device=CPU)
    layers = [module for module in base.modules() if is_4bit(module)]
    assert len(layers) == receipt.quantized.found
    assert expand(base, torch.bfloat16) == sum(2 * layer.in_features * layer.out_features for layer in layers)
    for layer in layers:
        assert layer.expanded_weight.dtype == torch.bfloat16
        assert torch.equal(layer.expanded_weight, dequantized(layer).bfloat16())
        assert weight_of(layer, torch.bfloat16) is layer.expanded_weight
        assert layer.weight.dtype == torch.uint8
    assert base_sha256(base) == receipt.sha256
    assert not hasattr(base.get_output_embeddings(), "expanded_weight")
    assert not [name for name in base.state_dict() if "expanded" in name]  # nothing of it is saved


def test_a_16_bit_base_has_nothing_to_expand(tiny: Tiny) -> None:
    base, _, _ = load_base(str(tiny("llama2")), None, precision_named("bf16"), "bfloat16", device=CPU)
    assert expand(base, torch.bfloat16) == 0
    layer = base.model.layers[0].mlp.up_proj
    assert weight_of(layer, torch.bfloat16).data_ptr() == layer.weight.data_ptr()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, recipe_for: Callable[..., type[Recipe]]
) -> Callable[..., RunFolder]:
    """Train a recipe of a family with its weights stored in one way; equal arguments are trained once."""
    made: dict[Any, RunFolder] = {}

    def run(family: str, precision: str, storage: str) -> RunFolder:
        key = family, precision, storage
        if key not in made:
            recipe = recipe_for(family, lora=dict(r=4, target_modules=list(ATTENTION[family])))
            settings = resolve(
                recipe,
                model=str(tiny(family)),
                dataset=recipe.dataset.source,
                precision=precision,
                storage=storage,
                output_dir=tmp_path_factory.mktemp("run") / "run",
            )
            made[key] = train(settings)
        return made[key]

    return run


def losses(folder: RunFolder) -> list[float]:
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("family", "precision", "storage"),
    [
        ("llama2", "nf4", "expanded"),
        ("falcon", "nf4", "expanded"),
        ("llama2", "fp4", "expanded"),
        pytest.param("llama2", "nf4", "blocked", marks=needs_bfloat16),
        pytest.param("falcon", "bf16", "blocked", marks=needs_bfloat16),
    ],
)
def test_a_run_ends_the_same_however_its_weights_are_kept(
    runs: Callable, family: str, precision: str, storage: str
) -> None:
    packed, other = (runs(family, precision, each) for each in ("packed", storage))
    was, found = packed.receipt(), other.receipt()
    assert losses(packed) == losses(other)
    assert len(losses(packed)) == 3
    assert was.adapter == found.adapter
    assert (was.base.storage, found.base.storage) == ("packed", storage)
    assert replace(was.base, storage=storage) == found.base  # its sha256 among the rest


def test_auto_is_the_fastest_where_there_is_room(runs: Callable) -> None:
    for precision, otherwise in (("nf4", "expanded"), ("bf16", "packed")):
        expected = "blocked" if is_available() else otherwise
        assert runs("llama2", precision, "auto").receipt().base.storage == expected
