"""What no CPU can show: the kernels, dtypes, waits and memory of an NVIDIA GPU. `make gpu` runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attention import dense_mask
from torch.nn import functional

from qlora_recipes import Recipe
from qlora_recipes.kernels import attention
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or QLORA_RECIPES_TEST_GPU does not name it"),
]
STEPS = 8
"""Enough for float16's loss scaler to find its scale and then train."""


@pytest.fixture
def run(
    recipe_for: Callable[..., type[Recipe]], tiny: Callable[[str], Path], tmp_path: Path
) -> Callable[..., RunFolder]:
    """Return a function that trains a random model of a family."""
    return lambda family, precision: train(
        resolve(
            recipe_for(family),
            model=str(tiny(family)),
            precision=precision,
            training={"max_steps": STEPS},
            output_dir=tmp_path / "run",
        )
    )


@pytest.mark.parametrize("family", ["llama2", "falcon"])
@pytest.mark.parametrize("precision", ["nf4", "bf16", "fp16", "int8"])
def test_a_run_trains_on_the_gpu(run: Callable[..., RunFolder], family: str, precision: str) -> None:
    receipt = run(family, precision).receipt()
    assert receipt.training.device == torch.cuda.get_device_name() and receipt.adapter.all_finite
    assert not [check for check in receipt.checks if check.verdict == "fail"]
    if precision in ("nf4", "int8"):
        assert set(receipt.base.linears) == {"Linear4bit" if precision == "nf4" else "Linear8bitLt"}


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (71, 1)], ids=str)
def test_flash_attention_by_conversation_is_attention_under_a_mask(heads: tuple[int, int]) -> None:
    lengths, size = [700, 300, 1, 47], 64
    bounds = torch.tensor([0, 700, 1000, 1001, 1048], dtype=torch.int32)
    torch.manual_seed(0)
    shapes = [(1, n, sum(lengths), size) for n in (heads[0], heads[1], heads[1])]
    parts = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    got, _ = attention.attention(torch.nn.Module(), *parts, bounds.cuda(), max_length_q=max(lengths))
    query, key, value = (part.detach().float().requires_grad_() for part in parts)
    grown = [part.repeat_interleave(heads[0] // heads[1], dim=1) for part in (key, value)]
    expected = functional.scaled_dot_product_attention(query, *grown, dense_mask(bounds).cuda()).transpose(1, 2)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.02)
    found = torch.autograd.grad(got, parts, gradient.to(torch.bfloat16))
    for one, other in zip(found, torch.autograd.grad(expected, [query, key, value], gradient), strict=True):
        relative = (one.float() - other).norm() / other.norm()
        assert relative < 0.02


def test_no_kernel_waits_for_the_gpu(run: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    def unheard(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            try:
                return function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("warn")

        return call

    for name in ("_bounds", "_lengths"):  # which are asked for once for all layers, by a probe; not by a step
        monkeypatch.setattr(attention, name, unheard(getattr(attention, name)))
    monkeypatch.setattr(attention, "SHORT", 32)  # rows of few tokens keep a mask
    with warnings.catch_warnings(record=True) as caught:  # the mode itself warns that it is a prototype
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run("falcon", "nf4")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    heard = [str(each.filename) for each in caught if "synchronizing CUDA operation" in str(each.message)]
    assert heard and not [name for name in heard if "/qlora_recipes/kernels/" in name]
