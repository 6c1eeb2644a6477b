"""The linear layer with its LoRA update in one function against PEFT's own forward and against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from preflight_runs import read
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_recipes import Recipe
from qlora_recipes.base import repairs
from qlora_recipes.kernels.dequantize import dequantized, expand
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.training import build
from qlora_recipes.training.build import build_trainer, load_model

KINDS = ["bf16", "nf4", "expanded"]
INPUTS, OUTPUTS = 64, 96


class Base(nn.Module):
    """A linear layer, found by name as PEFT finds it."""

    def __init__(self, kind: str = "bf16", *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=torch.bfloat16)
        self.config: dict[str, Any] = {}
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = kind in ("nf4", "expanded"), kind == "int8"  # for PEFT
        if kind in ("nf4", "expanded"):
            layer = bitsandbytes.nn.Linear4bit(
                INPUTS, OUTPUTS, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layer.load_state_dict(self.proj.state_dict())
            self.proj = layer.to("cpu")
            self.proj.support_avx512bf16_for_cpu = False  # as repairs.keep_4bit_gradients
            if bias:
                self.proj.bias.data = self.proj.bias.data.bfloat16()
        elif kind == "int8":
            layer = bitsandbytes.nn.Linear8bitLt(INPUTS, OUTPUTS, bias=bias, has_fp16_weights=False)
            layer.load_state_dict(self.proj.state_dict())
            self.proj = layer.to("cpu")
        if kind == "expanded":
            expand(self, torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def adapted(kind: str = "bf16", *, bias: bool = False, joined: int | None = 1, **lora: Any) -> PeftModel:
    """Return the layer with a float32 adapter that is not zero; `joined` is how many layers must take the function."""
    given = {"r": 4, "lora_alpha": 12, "target_modules": ["proj"], **lora}
    model = get_peft_model(Base(kind, bias=bias), LoraConfig(**given))
    fill(model)
    if joined is not None:
        assert fuse_lora_layers(model) == joined
    return model


def fill(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name and weight.is_floating_point():
            weight.data = torch.randn(weight.shape, generator=draw) / 8


def layer_of(model: PeftModel) -> LoraLayer:
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def run(model: PeftModel, x: torch.Tensor, *, autocast: bool = True) -> dict[str, torch.Tensor]:
    """Return the output for an input, and the gradients of the input and of both of the adapter's weights."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(drawn(*y.shape).to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return found | {
        next(part for part in name.split(".") if part.startswith("lora_")): g for name, g in gradients.items()
    }


def exact(model: PeftModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same by the formula, in float64."""
    layer = layer_of(model)
    base, scaling = layer.get_base_layer(), layer.scaling["default"]
    a, b = (part["default"].weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    x = x.double().requires_grad_()
    y = x @ dequantized(base).double().T + scaling * (x @ a.T) @ b.T
    if base.bias is not None:
        y = y + base.bias.double()
    y.backward(drawn(*y.shape).double())
    return {"y": y.detach(), "x": x.grad, "lora_A": a.grad, "lora_B": b.grad}


def share(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, INPUTS), (2, 5, INPUTS), (1, 1, INPUTS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_and_gradients_are_those_of_peft_and_as_near_to_the_formula(
    kind: str, bias: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = drawn(*shape, dtype=dtype)
    ours, theirs = (run(adapted(kind, bias=bias, joined=joined), x) for joined in (1, None))
    expected = exact(adapted(kind, bias=bias), x)
    assert ours.keys() == theirs.keys() == expected.keys()
    assert ours["y"].dtype == torch.bfloat16
    for name, part in expected.items():
        assert ours[name].shape == theirs[name].shape == part.shape
        if name != "y":  # which bitsandbytes gives in the dtype of its input
            assert ours[name].dtype == theirs[name].dtype
        assert share(ours[name], theirs[name]) < 0.01, name
        assert share(ours[name], part) < max(1.5 * share(theirs[name], part), 0.004), name


def test_without_autocast_16_bits_stay_16_bits_and_float32_is_left_to_peft() -> None:
    model, untouched = adapted(bias=True), adapted(bias=True, joined=None)
    found = run(model, drawn(5, INPUTS), autocast=False)
    expected = exact(model, drawn(5, INPUTS))
    assert found["y"].dtype == torch.bfloat16
    assert found["lora_A"].dtype == torch.float32
    assert all(share(found[name], part) < 0.01 for name, part in expected.items())
    for each in (model, untouched):
        layer_of(each).get_base_layer().float()
    one, other = (run(each, drawn(5, INPUTS, dtype=torch.float32), autocast=False) for each in (model, untouched))
    assert all(torch.equal(part, other[name]) for name, part in one.items())
    assert one["y"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_without_a_gradient_gets_none(kind: str) -> None:
    model, x = adapted(kind), drawn(3, 4, INPUTS)
    expected = run(model, x)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.backward(drawn(*y.shape))
    assert x.grad is None
    layer = layer_of(model)
    assert torch.equal(layer.lora_A["default"].weight.grad, expected["lora_A"])
    assert torch.equal(layer.lora_B["default"].weight.grad, expected["lora_B"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert share(model(x), expected["y"]) < 0.01  # by kernels that keep no weight for a backward pass


def both(model: PeftModel, other: PeftModel, x: torch.Tensor) -> None:
    """Assert that two models give the same bits, the random numbers they draw being the same."""
    found = []
    for each in (model, other):
        torch.manual_seed(7)
        found.append(run(each, x))
    assert found[0].keys() == found[1].keys()
    for name, part in found[0].items():
        assert torch.equal(part, found[1][name]), name


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("bf16", {"lora_dropout": 0.3}),
        ("nf4", {"lora_dropout": 0.3}),
        ("bf16", {"use_dora": True, "lora_dropout": 0.3}),
        ("bf16", {"lora_bias": True, "bias": True}),
        ("int8", {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_what_is_more_than_plain_is_left_to_peft(kind: str, lora: dict[str, Any]) -> None:
    model = adapted(kind, joined=0, **lora)
    assert "forward" not in vars(layer_of(model))
    both(model, adapted(kind, joined=None, **lora), drawn(2, 3, INPUTS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_dora_is_that_of_peft_in_float32_and_as_near_to_the_formula(kind: str, bias: bool) -> None:
    repairs.float32_dora_norm()
    models = [adapted(kind, bias=bias, use_dora=True), adapted(kind, bias=bias, use_dora=True, joined=None)]
    for layer in map(layer_of, models):
        base, scaling, parts = layer.get_base_layer(), layer.scaling["default"], (layer.lora_B, layer.lora_A)
        up, down = (part["default"].weight.detach() for part in parts)
        norms = (dequantized(base).float() + scaling * up @ down).norm(dim=1)
        layer.lora_magnitude_vector["default"].weight.data = norms * drawn(OUTPUTS).float().mul(0.1).exp()
    x = drawn(2, 5, INPUTS)
    found, theirs = (run(model, x) for model in models)
    a, b, magnitude = (
        part["default"].weight.detach().double().requires_grad_()
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    )
    weight, z = dequantized(base).double(), x.double().requires_grad_()
    gain = magnitude / (weight + scaling * b @ a).norm(dim=1).detach()
    y = gain * (z @ weight.T + scaling * (z @ a.T) @ b.T) + (base.bias.double() if bias else 0)
    y.backward(drawn(*y.shape).double())
    formula = {"y": y.detach(), "x": z.grad}
    formula |= {"lora_A": a.grad, "lora_B": b.grad, "lora_magnitude_vector": magnitude.grad}
    for name, part in formula.items():
        assert share(found[name], part) < 1.3 * share(theirs[name], part), name
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert share(models[0](x), formula["y"]) < 0.01


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_starts_at_the_base_to_the_bit(kind: str, bias: bool) -> None:
    repairs.float32_dora_norm()
    base, x = Base(kind, bias=bias), drawn(2, 5, INPUTS)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["proj"], use_dora=True))
    assert fuse_lora_layers(model) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16), model.disable_adapter():
        expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), expected)
        with torch.no_grad():
            assert torch.equal(model(x), expected)


def test_rank_stabilised_scales_are_plain() -> None:
    model, x = adapted(use_rslora=True), drawn(6, INPUTS)
    assert layer_of(model).scaling["default"] == 6
    assert all(share(run(model, x)[name], part) < 0.01 for name, part in exact(model, x).items())


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning")
@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in KINDS for case in ("two adapters", "disabled", "merged", "plain")],
)
def test_at_each_call_what_is_more_than_one_adapter_is_left_to_peft(kind: str, case: str) -> None:
    models = [adapted(kind), adapted(kind, joined=None)]
    x = drawn(4, INPUTS)
    found = []
    for model in models:
        layer = layer_of(model)
        if case == "two adapters":
            model.add_adapter("other", LoraConfig(r=2, target_modules=["proj"]))
            fill(model)
            model.base_model.set_adapter(["default", "other"])
        elif case == "merged":
            model.merge_adapter()  # an expanded weight is a copy, which it does not reach
            assert layer.merged
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            if case == "disabled":
                with model.disable_adapter():
                    found.append(model(x))
                assert torch.equal(found[-1], layer.get_base_layer()(x))
                assert not torch.equal(found[-1], model(x))
            else:
                found.append(model(x))
    if case == "plain":
        assert share(found[0], found[1]) < 0.01
    else:
        assert torch.equal(*found)


def test_layers_are_counted_and_others_passed_over() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: dict[str, Any] = {}
            self.one, self.two, self.three = (nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3))
            self.table = nn.Embedding(5, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.three(self.two(self.one(self.table(ids).bfloat16())))

    model = get_peft_model(Several(), LoraConfig(r=2, target_modules=["one", "two", "table"]))
    assert fuse_lora_layers(model) == 2
    assert fuse_lora_layers(model) == 2  # again changes nothing
    base = model.base_model.model
    assert ["forward" in vars(part) for part in (base.one, base.two, base.three, base.table)] == [
        True,
        True,
        False,
        False,
    ]


def test_the_layers_of_a_run_are_joined(
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined = []
    monkeypatch.setattr(build, "fuse_lora_layers", joined.append)
    run = load_model(read(recipe_for(), tiny("llama2"), output_dir=tmp_path))
    build_trainer(run, RunFolder(tmp_path))
    assert joined == [run.model]


@pytest.mark.parametrize("kind", KINDS)
def test_others_may_add_to_the_output_in_place(kind: str) -> None:
    """As Falcon does with the outputs of its attention and its MLP."""
    model, x = adapted(kind), drawn(2, 5, INPUTS)
    expected = run(model, x)
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        y += torch.ones_like(y)
    y.backward(drawn(*y.shape))
    assert torch.equal(y.detach(), expected["y"] + 1)
    assert torch.equal(x.grad, expected["x"])
    assert torch.equal(layer_of(model).lora_A["default"].weight.grad, expected["lora_A"])
    assert torch.equal(layer_of(model).lora_B["default"].weight.grad, expected["lora_B"])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same_bits(kind: str) -> None:
    model, x = adapted(kind), drawn(2, 5, INPUTS)
    expected = run(model, x)
    layer = layer_of(model)
    plain: Callable[..., torch.Tensor] = layer.forward
    layer.forward = lambda part: checkpoint(plain, part, use_reentrant=False)
    found = run(model, x)
    assert all(torch.equal(part, found[name]) for name, part in expected.items())


def test_gradients_of_several_batches_add_up() -> None:
    model = adapted("nf4")
    one, two = (run(model, drawn(count, INPUTS)) for count in (3, 4))
    model.zero_grad()
    for count in (3, 4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(drawn(count, INPUTS))
        y.backward(drawn(*y.shape))
    for name in ("lora_A", "lora_B"):
        found = getattr(layer_of(model), name)["default"].weight.grad
        assert torch.equal(found, one[name] + two[name])
