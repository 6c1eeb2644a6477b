"""In which numbers the run is held and computed, as found in memory and in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qlora_recipes.base.adapters import adapter_tensors
from qlora_recipes.base.loading import stored_tensors
from qlora_recipes.preflight.probes import logits, probe_batch
from qlora_recipes.preflight.verdicts import fail_unless, passed
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import ReadyRun

_BELOW_16_BITS = {"uint8", "int8"}


def base_dtype(run: ReadyRun) -> Check:
    """What is not quantized is in the run's 16-bit dtype; 4-bit layers dequantize to it and multiply in it."""
    found = {_name(weight.dtype) for name, weight in run.model.named_parameters() if "lora_" not in name}
    compute = {_name(module.compute_dtype) for module in run.model.modules() if getattr(module, "compute_dtype", None)}
    states = (getattr(weight, "quant_state", None) for weight in run.model.parameters())
    restored = {_name(state.dtype) for state in states if state is not None}
    others = (found | compute | restored) - _BELOW_16_BITS - {run.settings.dtype}
    stored = ", ".join(
        sorted(_name(tensor.dtype) for tensor in {t.dtype: t for _, t in stored_tensors(run.model)}.values())
    )
    return fail_unless(
        not others,
        f"{', '.join(sorted(others))} beside {run.settings.dtype}" if others else f"{stored} in memory",
        "Load the base through qlora_recipes.base.loading.load_base, which sets every one of them.",
    )


def compute_dtype(run: ReadyRun) -> Check:
    """What one adapted layer really gives back under the trainer's autocast."""
    layer = next(module for module in run.model.modules() if isinstance(module, LoraLayer))
    seen: list[torch.dtype] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    try:
        logits(run, probe_batch(run))
    finally:
        hook.remove()
    return fail_unless(
        {_name(dtype) for dtype in seen} == {run.settings.dtype},
        ", ".join(sorted({_name(dtype) for dtype in seen})),
        f"The run says {run.settings.dtype}; an environment variable or an accelerate config may say otherwise.",
    )


def adapter_dtype(run: ReadyRun) -> Check:
    """Adapter weights are float32 in every arm; in 16 bits small updates are rounded away."""
    found = sorted({_name(tensor.dtype) for _, tensor in adapter_tensors(run.model)})
    return fail_unless(found == ["float32"], ", ".join(found), "Build the trainer with repairs.float32_adapter.")


def optimizer_state_dtype(run: ReadyRun) -> Check:
    """What the optimizer keeps for a weight: float32, or fewer bits where its name says so."""
    name = run.trainer.args.optim.value
    kind, options = run.trainer.get_optimizer_cls_and_kwargs(run.trainer.args, run.model)
    try:
        found = _state_dtypes(kind, options, run.trainer.args.device)
    except Exception as error:  # some optimizers want a whole model, or a mode of their own
        return passed(f"{name} cannot be tried on one weight ({type(error).__name__})")
    fewer = "8bit" in name or "4bit" in name
    return fail_unless(
        fewer or set(found) <= {"float32"},
        f"{', '.join(found) or 'nothing of the size of the weights'} ({name})",
        "Small updates are rounded away; set --optim adamw_torch.",
    )


def _state_dtypes(kind: Any, options: Mapping[str, Any], device: torch.device) -> list[str]:
    """Take one step on one weight, and look at what is kept of its size."""
    weight = torch.nn.Parameter(torch.zeros(128, 64, device=device))  # bitsandbytes keeps float32 below 4,096
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], **options)
    optimizer.step()
    kept = (part for part in optimizer.state[weight].values() if torch.is_tensor(part))
    return sorted({_name(part.dtype) for part in kept if part.numel() >= weight.numel()})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
