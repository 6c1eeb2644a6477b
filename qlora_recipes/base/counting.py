"""What a base holds: which of its weights should be quantized, which are, and parameters and bytes by storage.

Looks at the weights themselves: a layer's class says what was intended, not what was done.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_recipes.kernels.dequantize import outlier_threshold
from qlora_recipes.kernels.experts import stacks, stored_name
from qlora_recipes.precision import Precision
from qlora_recipes.run.receipt import QuantizedReceipt

SMALL = 0.01
"""Share of the weights below which matrices of other layers, such as Mamba's, may stay in 16 bits."""


def quantizable(outline: PreTrainedModel) -> dict[str, int]:
    """Return name to number of weights of every matrix that should be quantized, from a model without its weights.

    They are those of the decoder blocks that multiply activations: linear layers, and the stacks of fused experts. Not
    embeddings, the output layer, norms and convolutions; nor routers, whose matrices have a row for each expert and are
    small. Matrices of layers that are of neither kind count where together they are more than `SMALL`.
    """
    output = outline.get_output_embeddings()
    fused = {name: getattr(module, part) for name, module, part in stacks(outline)}
    experts = max((len(stack) for stack in fused.values()), default=0)
    found, others = {name: stack.numel() for name, stack in fused.items()}, {}
    for prefix, module in outline.named_modules():
        if module is output or isinstance(module, nn.Embedding | _ConvNd):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if (type(module) is nn.Linear and name == "weight") or (isinstance(module, Conv1D) and weight.ndim == 2):
                found[f"{prefix}.{name}"] = weight.numel()
            elif weight.ndim == 2 and min(weight.shape) > experts:
                others[f"{prefix}.{name}"] = weight.numel()
    small = sum(others.values()) < SMALL * sum(found.values())
    return found if small else found | others


def count_quantized(base: PreTrainedModel, expected: dict[str, int], precision: Precision) -> QuantizedReceipt:
    """Return how many of the matrices that should be are stored as the precision says, and the names of the others."""
    stored = {stored_name(name): weight for name, weight in base.named_parameters()}
    found = {name: count for name, count in expected.items() if _is_stored_as(stored.get(name), precision)}
    thresholds = filter(None, map(outlier_threshold, base.modules()))
    return QuantizedReceipt(
        expected=len(expected),
        found=len(found),
        outlier_threshold=max(thresholds, default=None),
        share=sum(found.values()) / max(1, sum(expected.values())) if expected else 1.0,
        overlooked=[name for name in expected if name not in found],
    )


def _is_stored_as(weight: torch.Tensor | None, precision: Precision) -> bool:
    if weight is None or precision.quant_type is None:
        return weight is not None and weight.dtype == torch.int8
    state = getattr(weight, "quant_state", None)
    return state is not None and state.quant_type == precision.quant_type and state.nested == precision.double_quant


def count_matrices(base: PreTrainedModel, outline: PreTrainedModel) -> dict[str, int]:
    """Return class name to number of linear layers, the output layer left out, and of stacks of fused experts."""
    output = base.get_output_embeddings()
    linears = (module for module in base.modules() if isinstance(module, nn.Linear | Conv1D) and module is not output)
    fused = {name: type(module).__name__ for name, module, _ in stacks(outline)}
    packed = {stored_name(name) for name, weight in base.named_parameters() if hasattr(weight, "quant_state")}
    experts = ("Experts4bit" if name in packed else kind for name, kind in fused.items())
    return dict(Counter([*(type(module).__name__ for module in linears), *experts]))


def parameters_by_storage(base: PreTrainedModel) -> dict[str, int]:
    """Return storage to number of weights; one byte of 4-bit storage stands for two of them."""
    found: Counter[str] = Counter()
    for _, weight in base.named_parameters():
        state = getattr(weight, "quant_state", None)
        storage = str(weight.dtype).removeprefix("torch.") if state is None else "4-bit"
        found[storage] += weight.numel() if state is None else state.shape.numel()
    return dict(found)
