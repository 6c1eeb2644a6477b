"""Weights laid out for the products of a CPU: the bits of plain products, both ways, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fitting import Seven, machine, needed
from test_output_layer import drawn, scored
from torch import nn

from qlora_recipes.base.loading import base_sha256, load_base
from qlora_recipes.errors import UsageError
from qlora_recipes.kernels import blocked
from qlora_recipes.kernels.blocked import blocked_bytes, blocks_of, lay_out, times_transposed, times_weight
from qlora_recipes.kernels.output_layer import TOKENS, LogProbs
from qlora_recipes.memory import fitting
from qlora_recipes.memory.fitting import Machine, describe, fit_to_memory
from qlora_recipes.precision import precision_named
from qlora_recipes.settings import resolve
from qlora_recipes.training import train

Tiny = Callable[[str], Path]
needs_bfloat16 = pytest.mark.skipif(not blocked.is_available(), reason="this processor does not multiply in bfloat16")


def frozen(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


@needs_bfloat16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (24, 40), (344, 128), (1024, 2752)])
def test_products_are_those_of_the_weight_to_the_bit(inputs: int, outputs: int, bias: bool) -> None:
    layer = frozen(inputs, outputs, bias=bias)
    for tokens in (1, 3, 200, 513):
        x, d_y = torch.randn(tokens, inputs).bfloat16(), torch.randn(tokens, outputs).bfloat16()
        plain = times_weight(x, layer), times_transposed(d_y, layer)
        assert lay_out(layer) == blocked_bytes(layer) == 2 * layer.weight.nbytes
        assert blocks_of(layer.weight) is not None
        for found, expected in zip((times_weight(x, layer), times_transposed(d_y, layer)), plain, strict=True):
            assert torch.equal(found, expected)
        del layer.weight.blocked


@needs_bfloat16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_without_an_adapter_passes_its_gradient_on(dtype: torch.dtype) -> None:
    layer, x = frozen(64, 96, bias=True), torch.randn(2, 30, 64).to(dtype).requires_grad_()
    found = []
    for laid_out in (False, True):
        if laid_out:
            lay_out(layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        found.append((y, gradient))
    for plain, other in zip(*found, strict=True):
        assert other.dtype == plain.dtype
        assert torch.equal(plain, other)


@needs_bfloat16
@pytest.mark.parametrize("precision", ["nf4", "bf16", "int8"])
def test_every_frozen_linear_is_laid_out_and_the_base_stays_as_it_was(tiny: Tiny, precision: str) -> None:
    folder, cpu = str(tiny("llama2")), torch.device("cpu")
    base, receipt, _ = load_base(folder, None, precision_named(precision), "bfloat16", device=cpu)
    layers = [each for each in base.modules() if isinstance(each, nn.Linear)]
    expected = layers if precision != "int8" else [base.lm_head]
    lay_out(base)
    assert {id(each) for each in layers if blocks_of(each.weight)} == {id(each) for each in expected}
    assert blocked_bytes(base) == sum(4 * each.in_features * each.out_features for each in expected)
    assert base_sha256(base) == receipt.sha256
    assert not [name for name in base.state_dict() if "blocked" in name]  # nothing of it is saved


@needs_bfloat16
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, TOKENS + 1])
def test_the_output_layer_gives_the_same_bits(count: int, biased: bool) -> None:
    given = drawn(count, torch.bfloat16, biased=biased)
    plain = scored(LogProbs, given)
    head = nn.Linear(24, 300, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.data = given["weight"]
    lay_out(head)
    for name, found in scored(LogProbs, {**given, "weight": head.weight}).items():
        assert torch.equal(found, plain[name]), name


def test_weights_are_laid_out_where_a_cpu_has_room_for_it() -> None:
    here = machine(10_000, "cpu", blocks=True)
    for precision in ("nf4", "bf16"):
        asked = resolve(Seven, precision=precision)
        found = fit_to_memory(asked, here)
        assert found.storage == "blocked"
        assert "blocked, " in describe(found, here)
        room = needed(found, here, storage="blocked")
        assert fit_to_memory(found, Machine("cpu", room, blocks=True)) == found
        less = fit_to_memory(asked, Machine("cpu", room - 1, blocks=True))
        assert (less.storage, less.training) != (found.storage, found.training)
    others = [("int8", None, "packed"), ("fp16", None, "packed"), ("nf4", "float16", "expanded")]
    for precision, dtype, storage in others:
        assert fit_to_memory(resolve(Seven, precision=precision, dtype=dtype), here).storage == storage
    assert fit_to_memory(resolve(Seven, precision="nf4"), machine(10_000, "cpu")).storage == "expanded"
    with_experts: Any = SimpleNamespace(linears=(), weights=("experts",))
    assert list(fitting._storages(with_experts, resolve(Seven), here)) == ["expanded"]


def test_what_cannot_be_laid_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="int8 multiplies in 8"):
        resolve(Seven, precision="int8", storage="blocked")
    for here, dtype, got in (
        (machine(80), "bfloat16", "got bfloat16 on cuda"),
        (machine(80, "cpu"), "bfloat16", "got bfloat16 on cpu"),
        (machine(80, "cpu", blocks=True), "float16", "got float16 on cpu"),
    ):
        monkeypatch.setattr(train, "machine", lambda here=here: here)
        with pytest.raises(UsageError, match=f"--storage blocked: {got}"):
            train.finalize_settings(resolve(Seven, precision="nf4", dtype=dtype, storage="blocked"))
