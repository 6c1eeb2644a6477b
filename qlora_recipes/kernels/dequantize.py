"""Quantized weights that are dequantized for every product, or once and kept: packed or expanded.

Expanded, NF4 computes with the numbers of NF4 at the speed of 16 bits, and takes the memory of both: the packed weights
stay, since they are what was loaded, counted and hashed.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn
from torch.nn import functional

EXPANDED = "expanded_weight"


def expand(model: nn.Module, dtype: torch.dtype) -> int:
    """Keep the 16-bit weight of every 4-bit linear beside it; return the bytes that takes."""
    layers = [module for module in model.modules() if is_4bit(module)]
    for layer in layers:
        setattr(layer, EXPANDED, dequantized(layer).to(dtype))
        layer.forward = MethodType(_forward, layer)
    return sum(getattr(layer, EXPANDED).nbytes for layer in layers)


def is_4bit(module: nn.Module) -> bool:
    """Whether a layer's weight is stored in bitsandbytes' 4 bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def dequantized(module: nn.Linear) -> torch.Tensor:
    """Return a linear layer's weight as it is multiplied with, whatever it is stored as."""
    from bitsandbytes import functional as stored

    weight = module.weight
    if is_4bit(module):
        return stored.dequantize_4bit(weight.data, weight.quant_state)
    if weight.dtype == torch.int8:
        return stored.int8_vectorwise_dequant(weight.data, row_scales(module))
    return weight.data


def row_scales(module: nn.Module) -> torch.Tensor | None:
    """Return the scales of an int8 layer, which move from its weight to its state with the first pass."""
    found = getattr(module.weight, "SCB", None)
    return found if found is not None else getattr(getattr(module, "state", None), "SCB", None)


def weight_of(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that a layer multiplies with: kept, or dequantized now."""
    kept = getattr(layer, EXPANDED, None)
    return (dequantized(layer) if kept is None else kept).to(dtype)


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(self, EXPANDED)
    return functional.linear(x.to(weight.dtype), weight, self.bias).to(x.dtype)
