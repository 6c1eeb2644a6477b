"""A family holds what sets an architecture apart: its layers, its sizes from a configuration and back, its repairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_recipes.base import repairs
from qlora_recipes.families import FAMILIES
from qlora_recipes.families.family import RMS_NORM, Family, Linear
from qlora_recipes.memory.sizes import linear_shapes, sizes_of, unquantized_parameters
from qlora_recipes.models import MODELS, ModelSpec


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.family)
def test_sizes_survive_the_way_through_a_configuration(spec: ModelSpec, tmp_path: Path) -> None:
    from transformers import AutoConfig

    family, sizes = spec.sizes.family, spec.sizes
    shared = {name: getattr(sizes, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    own = family.config_from_sizes(sizes)
    AutoConfig.for_model(family.model_types[0], vocab_size=sizes.vocab_size, **shared, **own).save_pretrained(tmp_path)
    assert sizes_of(tmp_path) == sizes
    assert spec.linear_layers == family.linear_layers == sizes.linear_layers == tuple(linear_shapes(sizes))


@pytest.mark.parametrize("family", dict.fromkeys(FAMILIES.values()), ids=lambda family: family.model_types[0])
def test_a_family_names_repairs_that_are_there(family: Family) -> None:
    assert all(callable(getattr(repairs, name)) for name in (family.attention_repair,) if name)
    assert any(linear.reads == "attention" for linear in family.linears)


def test_a_third_family_is_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third = Family(
        model_types=("third",),
        linears=(Linear("qkv", "norm", outputs="query_key_value_size"), Linear("out", "attention")),
        norm=RMS_NORM,
        norms=1,
        sizes_from_config=lambda config: {
            "num_key_value_heads": config["kv"],
            "intermediate_size": 8,
            "tied_embeddings": True,
        },
        config_from_sizes=lambda sizes: {"kv": sizes.num_key_value_heads},
        fused_qkv=True,
        mlp_kept=1,
        mlp_forward=1,
        mlp_workspace=(2, 4),
        heap=(0.25, 1.0),
    )
    monkeypatch.setitem(FAMILIES, "third", third)
    shared = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "third", "kv": 2, **shared}))
    sizes = sizes_of(tmp_path)
    assert linear_shapes(sizes) == {"qkv": (8, 16), "out": (8, 8)}
    assert unquantized_parameters(sizes) == 10 * 8 + 3 * 8
    assert sizes.inputs_read(sizes.linear_layers) == 8 + 8
