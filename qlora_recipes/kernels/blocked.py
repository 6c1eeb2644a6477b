"""Products by frozen weights on a CPU, kept in the blocks that oneDNN multiplies by. Knows nothing of recipes or runs.

A plain 16-bit product copies its weight into such blocks at every call. Here each weight is laid out once for x W^T and
once for d_y W, which takes twice its memory: the same bits in less time (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from qlora_recipes.kernels.dequantize import dequantized, is_4bit, weight_of

DTYPE = torch.bfloat16
_BLOCKED = "blocked"
_TOKENS = 2048
"""Rows of the products that the blocks are chosen for; any other number is multiplied, too."""


@dataclass(frozen=True)
class Blocked:
    """One weight [outputs, inputs], laid out for both directions."""

    weight: torch.Tensor
    transposed: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * DTYPE.itemsize + self.transposed.numel() * DTYPE.itemsize

    def times(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, inputs] -> x W^T + bias, [tokens, outputs]."""
        return _linear(x, self.weight, bias)

    def times_transposed(self, d_y: torch.Tensor) -> torch.Tensor:
        """d_y [tokens, outputs] -> d_y W, [tokens, inputs]."""
        return _linear(d_y, self.transposed, None)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def is_available() -> bool:
    """Whether this processor multiplies in bfloat16, with PyTorch's oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def lay_out(model: nn.Module) -> int:
    """Keep every frozen linear weight of 4 or 16 bits in blocks as well; return the bytes that the copies take."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _suits(module)]
    for layer in layers:
        weight = dequantized(layer).detach().to(DTYPE)
        both = (torch.ops.mkldnn._reorder_linear_weight(each, _TOKENS) for each in (weight, weight.T.contiguous()))
        setattr(layer.weight, _BLOCKED, Blocked(*both))
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]  # of this layer alone
    return blocked_bytes(model)


def blocked_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights of a model that are kept in blocks."""
    return sum(blocks.nbytes for weight in model.parameters() if (blocks := blocks_of(weight)))


def _suits(layer: nn.Linear) -> bool:
    return not layer.weight.requires_grad and (is_4bit(layer) or layer.weight.dtype == DTYPE)


def blocks_of(weight: torch.Tensor) -> Blocked | None:
    """Return a weight in blocks, or None where it was not laid out."""
    return getattr(weight, _BLOCKED, None)


def times_weight(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """Return x W^T + bias for a frozen layer, however its weight is kept; x [tokens, inputs], outside of autograd."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    blocked = blocks_of(layer.weight)
    if blocked is None or x.dtype != DTYPE:
        return nn.functional.linear(x, weight_of(layer, x.dtype), bias)
    return blocked.times(x, bias)


def times_transposed(d_y: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """Return d_y W, the gradient of a frozen layer's input, however its weight is kept; d_y [tokens, outputs]."""
    blocked = blocks_of(layer.weight)
    if blocked is None or d_y.dtype != DTYPE:
        return d_y @ weight_of(layer, d_y.dtype)
    return blocked.times_transposed(d_y)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        return times_weight(x, layer)

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, None]:
        return times_transposed(d_y, ctx.layer), None


_apply: Callable[..., torch.Tensor] = _Product.apply  # which torch does not annotate


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Take the place of `forward` in a layer that was laid out."""
    if x.dtype == DTYPE or is_4bit(self):
        y = _apply(x.to(DTYPE).flatten(0, -2), self)
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)
    return type(self).forward(self, x)
