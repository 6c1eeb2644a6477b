"""Quantized weights, dequantized for every product (packed), or once and kept (expanded).

Expanded, NF4 computes with the numbers of NF4 at the speed of 16 bits, and takes the memory of both: the packed weights
stay, because they are what was loaded, counted and hashed. Knows nothing of recipes or runs.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList

EXPANDED = "expanded_weight"


def expand(model: nn.Module, dtype: torch.dtype) -> int:
    """Keep a 16-bit copy of every weight that is stored in 4 bits; return the bytes that the copies take."""
    layers = [module for module in model.modules() if is_4bit(module)]
    for layer in layers:
        setattr(layer, EXPANDED, dequantized(layer).to(dtype))
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]  # of this layer alone
    stacks = [module for module in model.modules() if isinstance(module, ParametrizationList)]
    for stack in stacks:
        setattr(stack[0], EXPANDED, stack[0](stack.original).to(dtype))
    return sum(getattr(kept, EXPANDED).nbytes for kept in (*layers, *(stack[0] for stack in stacks)))


def is_4bit(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer's weight is stored in bitsandbytes' 4 bits."""
    return quant_state(module) is not None


def quant_state(module: nn.Module) -> Any:
    """Return bitsandbytes' constants of a 4-bit layer, which a weight that FSDP has gathered is without; else None."""
    found = getattr(getattr(module, "weight", None), "quant_state", None)
    return found if found is not None else getattr(module, "quant_state", None)


def dequantized(module: nn.Linear, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return a linear layer's weight as it is multiplied, however it is stored; `weight` is it as stored, gathered."""
    from bitsandbytes import functional as stored

    found = module.weight.data if weight is None else weight
    if is_4bit(module):
        found = stored.dequantize_4bit(found, quant_state(module))
    elif found.dtype == torch.int8:
        found = stored.int8_vectorwise_dequant(found, row_scales(module))
    return found


def row_scales(module: nn.Module) -> Any:
    """Return the scales of an int8 layer, a tensor that moves from its weight to its state with the first pass."""
    found = getattr(module.weight, "SCB", None)
    return found if found is not None else getattr(getattr(module, "state", None), "SCB", None)


def outlier_threshold(module: nn.Module) -> float | None:
    """Return LLM.int8's threshold of an int8 layer; None for any other layer.

    A column of a layer's input that reaches it anywhere in the batch is multiplied in 16 bits (arXiv 2208.07339).
    """
    return getattr(getattr(module, "state", None), "threshold", None)


def weight_of(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that a layer multiplies by: kept, or dequantized now."""
    kept = getattr(layer, EXPANDED, None)
    return (dequantized(layer) if kept is None else kept).to(dtype)


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(self, EXPANDED)
    return functional.linear(x.to(weight.dtype), weight, self.bias).to(x.dtype)
