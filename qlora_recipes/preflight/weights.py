"""How weights are stored and computed with: the base, how far it is from its checkpoint, the adapter, the optimizer.

Changes nothing of the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from qlora_recipes.base.adapters import adapter_tensors
from qlora_recipes.base.checkpoint import layer_errors, weight_files
from qlora_recipes.base.loading import stored_tensors
from qlora_recipes.kernels.dequantize import quant_state
from qlora_recipes.preflight.checks import fail_unless, untested, warn_unless
from qlora_recipes.preflight.probes import logits, probe_batch
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run

_SAMPLE = 2**16  # weights of each layer that are compared; 224 layers of 7B give 15 million
# Root mean square error of blocks of 64 normal weights, relative to the weights. In 16 bits there is none: the bound of
# 2**-9 leaves room for one more rounding.
_EXPECTED_ERROR = {"nf4": 0.095, "nf4-single": 0.095, "fp4": 0.13, "int8": 0.012, "bf16": 0.002, "fp16": 0.002}
_BELOW_16_BITS = {"uint8", "int8"}


def quantized_linears(run: Run) -> Check:
    """Linear layers and stacks of experts, and how many of those that should be are stored in fewer bits."""
    quantized, name = run.base.quantized, run.settings.precision.name
    classes = ", ".join(f"{count} {kind}" for kind, count in run.base.linears.items())
    figure = f"{quantized.found} of {quantized.expected} as {name} ({classes})"
    if quantized.overlooked:
        first = ", ".join(quantized.overlooked[:3]) + (", ..." if len(quantized.overlooked) > 3 else "")
        figure += f", {quantized.share:.1%} of their weights; not {first}"
    return fail_unless(
        quantized.found == quantized.expected and (quantized.expected > 0 or not run.settings.precision.quantized),
        figure,
        f"The rest would train in {run.base.dtype} under the name of {name}: use --precision bf16, or accept it with "
        "--skip_checks quantized_linears; the receipt has the share.",
    )


def checkpoint_names(run: Run) -> Check:
    """A weight that the checkpoint does not name is drawn at random when the base is loaded."""
    missing = run.base.missing_keys
    count = sum("lora_" not in name for name, _ in run.model.named_parameters())
    of_blocks = [name for name in missing if re.search(r"\.\d+\.", name)]
    if of_blocks:
        missing = of_blocks
    figure = f"all {count} weights are in the checkpoint"
    if missing:
        figure = f"{len(missing)} of {count} weights are not in the checkpoint, {missing[0]} first"
    judge = fail_unless if of_blocks else warn_unless
    return judge(not missing, figure, "They are random; is this the model that the checkpoint was made for?")


def quantization_error(run: Run) -> Check:
    """The weights in memory beside those in the checkpoint, sampled from each layer: mean and worst layer."""
    files = weight_files(run.settings.model, run.base.revision)
    errors = dict(layer_errors(run.model, files, getattr(torch, run.settings.dtype), sample=_SAMPLE))
    if not errors:
        return untested("no linear layer has its name in the checkpoint")
    mean = sum(errors.values()) / len(errors)
    worst = max(errors, key=lambda name: errors[name])
    expected = _EXPECTED_ERROR[run.settings.precision.name]
    return fail_unless(
        mean <= 2 * expected and errors[worst] <= 5 * expected,
        f"{mean:.2%} of the weights' norm, worst {errors[worst]:.2%} ({'.'.join(worst.split('.')[-3:])})",
        f"About {expected:.1%} is normal for {run.settings.precision.name}: these are not the checkpoint's weights.",
    )


# ---- Data types, as found in memory and in one pass ----


def base_dtype(run: Run) -> Check:
    """What is not quantized is in the run's 16-bit dtype; 4-bit layers dequantize to it and multiply in it.

    Transformers keeps in float32 what a model's class names, such as the bias of a router.
    """
    model = cast(PreTrainedModel, run.model.get_base_model())
    kept = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())}
    weights = [(name, weight) for name, weight in run.model.named_parameters() if "lora_" not in name]
    by_design = {name for name, weight in weights if weight.dtype == torch.float32 and any(k in name for k in kept)}
    found = {_name(weight.dtype) for name, weight in weights if name not in by_design}
    compute = {_name(module.compute_dtype) for module in run.model.modules() if getattr(module, "compute_dtype", None)}
    owned = (getattr(weight, "quant_state", None) for weight in run.model.parameters())
    states = [*owned, *map(quant_state, run.model.modules())]  # what FSDP has divided is with the module
    restored = {_name(state.dtype) for state in states if state is not None}
    others = (found | compute | restored) - _BELOW_16_BITS - {run.settings.dtype}
    stored = ", ".join(sorted({_name(tensor.dtype) for _, tensor in stored_tensors(run.model)}))
    return fail_unless(
        not others,
        f"{', '.join(sorted(others))} beside {run.settings.dtype}" if others else f"{stored} in memory",
        "Load the base through qlora_recipes.base.loading.load_base, which sets every one of them.",
    )


def compute_dtype(run: Run) -> Check:
    """What one adapted layer really returns under the trainer's autocast."""
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


def adapter_dtype(run: Run) -> Check:
    """Adapter weights are float32 in every arm; in 16 bits small updates are rounded away."""
    found = sorted({_name(tensor.dtype) for _, tensor in adapter_tensors(run.model)})
    return fail_unless(found == ["float32"], ", ".join(found), "Use base.adapters.attach, which keeps it float32.")


def optimizer_state_dtype(run: Run) -> Check:
    """What the optimizer keeps for a weight: float32, or fewer bits where its name says so."""
    args = run.trainer.args
    name = str(getattr(args.optim, "value", args.optim))
    kind, options = run.trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, run.model))
    try:
        found = _state_dtypes(kind, options, args.device)
    except Exception as error:  # some optimizers want a whole model, or a mode of their own
        return untested(f"{name} cannot be tried on one weight ({type(error).__name__})")
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


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
