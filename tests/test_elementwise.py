"""Norms and gated MLPs that keep less give the model's own numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from qlora_recipes.kernels.elementwise import fuse_norms_and_gates

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
)


def made(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for name, weight in model.named_parameters():
        weight.requires_grad_("embed" in name)
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    return model


def of_a_pass(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return logits, the embedding's gradient, and the bytes that were kept for it."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = []
    ids = torch.arange(100)[None]
    with saved_tensors_hooks(lambda tensor: held.append(tensor) or keep(tensor), lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.float().pow(2).mean(), model.get_input_embeddings().weight)  # type: ignore[operator]  # a method of the model
    return logits, gradient, sum(kept.values())


@pytest.mark.parametrize(("config", "joined"), [(LlamaConfig, 7), (Qwen3Config, 11)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_numbers_are_the_models_own(config: Any, joined: int, dtype: torch.dtype, tolerance: float) -> None:
    model = made(config(**SMALL), dtype)
    ours = copy.deepcopy(model)
    assert fuse_norms_and_gates(ours) == fuse_norms_and_gates(ours) == joined  # again changes nothing
    (logits, gradient, kept), (logits_2, gradient_2, kept_2) = of_a_pass(model), of_a_pass(ours)
    assert torch.equal(logits, logits_2)
    assert (gradient - gradient_2).norm() < tolerance * gradient.norm()
    assert kept_2 < kept


def test_gemmas_norm_is_left_alone() -> None:
    """It adds one to its weight, and its MLP has GELU for a gate."""
    assert fuse_norms_and_gates(made(Gemma2Config(**SMALL), torch.float32)) == 0


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    model = made(LlamaConfig(**SMALL), torch.float32)
    fuse_norms_and_gates(model)
    weight = model.get_parameter("model.norm.weight").requires_grad_()
    model(input_ids=torch.arange(9)[None], use_cache=False).logits.sum().backward()
    assert weight.grad is not None and weight.grad.any()
