"""Every optimizer that needs no other package trains an adapter, and keeps what the memory plan says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from preflight_runs import ready
from transformers.training_args import OptimizerNames

from qlora_recipes import Recipe
from qlora_recipes.memory.estimate import ADAMW_BYTES, OPTIMIZER_BYTES, optimizer_bytes
from qlora_recipes.preflight import Run
from qlora_recipes.preflight.probes import gradients, probe_batch
from qlora_recipes.training.accounting import optimizer_state

TRIED = (
    "adamw_torch adamw_torch_fused adafactor ademamix sgd adagrad adamw_bnb_8bit adamw_8bit ademamix_8bit lion_8bit "
    "lion_32bit paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit "
    "paged_lion_8bit rmsprop rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit"
).split()
NEEDS_A_PACKAGE = "galore apollo schedule_free lomo adalomo grokadamw stable_adamw adamw_anyprecision".split()
TORCHAO_OR_HARDWARE = {"adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_xla", "adamw_torch_npu_fused"}


@pytest.fixture(scope="module")
def run(tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path_factory: pytest.TempPathFactory):
    """Return a run in NF4 whose adapter is large enough for 8-bit states: bitsandbytes keeps float32 below 4,096."""
    recipe = recipe_for(lora=dict(r=64, target_modules=["gate_proj", "down_proj"]))
    return ready(recipe, tiny("llama2"), tmp_path_factory.mktemp("run"))


def test_every_optimizer_of_upstream_is_tried_or_refused() -> None:
    others = {name.value for name in OptimizerNames} - set(TRIED) - TORCHAO_OR_HARDWARE
    assert {name for name in others if not name.startswith(tuple(NEEDS_A_PACKAGE))} == set()
    assert OPTIMIZER_BYTES.keys() - set(TRIED) == {"adamw_torch_4bit", "adamw_torch_8bit", "ademamix_32bit"}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", TRIED)
def test_an_optimizer_moves_every_weight_and_keeps_what_is_planned(name: str, run: Run) -> None:
    trainer, weights = run.trainer, [weight for weight in run.model.parameters() if weight.requires_grad]
    trainer.args.optim, trainer.optimizer = name, None
    for part, weight in run.model.named_parameters():
        if "lora_B" in part:
            torch.nn.init.normal_(weight, std=0.01)  # or A has no gradient
    before = [weight.detach().clone() for weight in weights]
    optimizer = trainer.create_optimizer()
    found = gradients(run, probe_batch(run))
    for _ in range(2):
        for part, weight in run.model.named_parameters():
            weight.grad = found.get(part)
        optimizer.step()
    assert all(bool(torch.isfinite(weight).all()) for weight in weights)
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    kept, count = optimizer_state(optimizer), sum(weight.numel() for weight in weights)
    assert ("uint8" in kept) == ("8bit" in name)
    planned = optimizer_bytes(name, count)
    if name == "adafactor":  # factored: a row and a column for each weight, and the plan counts two moments
        assert 0 < sum(kept.values()) < 0.02 * ADAMW_BYTES * count
    else:
        assert planned <= sum(kept.values()) <= 1.05 * planned + 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA driver does the paging")
def test_a_paged_state_leaves_the_gpu_and_comes_back() -> None:
    """bitsandbytes pages the state of a weight of 100,000 elements or more, and of no smaller one."""
    large, small, plain = (torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in (2**25, 2**16, 2**25))
    paged = bitsandbytes.optim.PagedAdamW32bit([large, small], lr=1e-3)
    unpaged = bitsandbytes.optim.AdamW32bit([plain], lr=1e-3)

    def step() -> None:
        for weight in (large, small, plain):
            weight.grad = torch.ones_like(weight)
        paged.step()
        unpaged.step()
        torch.cuda.synchronize()

    step()
    sizes = optimizer_state(paged)
    assert sizes["float32 paged"] == 8 * large.numel() and sizes["float32"] == 8 * small.numel()
    for state in (paged.state[large]["state1"], paged.state[large]["state2"]):
        assert state.device.type == "cpu" and state.mul_(1).any()  # what the processor writes, the driver brings to it
    step()
    assert torch.equal(large, plain)
