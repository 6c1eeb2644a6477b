"""Fused experts in 4 bits: a stack [experts, ., .] that is dequantized when its module computes, and not kept.

A parametrization of PyTorch's dequantizes the stack where the module reads it, so every implementation of experts that
Transformers has multiplies by it. Knows nothing of recipes or runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

_PACKED = re.compile(r"parametrizations\.(\w+)\.original")


class Dequantize(nn.Module):
    """From a 4-bit parameter to the 16-bit stack that it stands for."""

    kept: torch.Tensor | None = None
    """The stack itself, where there is memory for both; it belongs to no state dict."""

    @torch.no_grad()
    def forward(self, packed: Any) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        found = dequantize_4bit(packed.data, packed.quant_state) if self.kept is None else self.kept
        return cast(torch.Tensor, found)


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the full name, the module and the name in it of every stack of matrices that is not a convolution's."""
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and min(weight.shape) > 1 and not isinstance(module, _ConvNd):
                yield f"{prefix}.{name}", module, name


def stored_name(name: str) -> str:
    """Return the name that a parameter has in the checkpoint, also where it is stored in 4 bits."""
    return _PACKED.sub(r"\1", name)


def pack(module: nn.Module, name: str, owner: nn.Module | None) -> None:
    """Have a module dequantize one of its parameters, which bitsandbytes has quantized, each time it computes.

    `owner` is the layer around it, whose gradient checkpointing says that nothing in it is kept.
    """
    parametrize.register_parametrization(module, name, Dequantize(), unsafe=True)
    if "forward" not in vars(module):
        vars(module)["owner"] = (owner,)  # no submodule of the one that is in it
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]  # of this module alone


def _forward(self: Any, *arguments: Any, **others: Any) -> Any:
    """Compute with each stack dequantized once, and dequantized anew for the gradient instead of kept for it."""
    chains = self.parametrizations.values()
    adapted = any(len(chain) > 1 for chain in chains)  # PEFT takes its part away again before the gradient is computed
    kept = any(chain[0].kept is not None for chain in chains)
    inside = getattr(self.owner[0], "gradient_checkpointing", False)
    if adapted or kept or inside or not (self.training and torch.is_grad_enabled()):
        return _compute(self, *arguments, **others)
    return checkpoint(_compute, self, *arguments, use_reentrant=False, **others)


def _compute(self: Any, *arguments: Any, **others: Any) -> Any:
    with parametrize.cached():
        return type(self).forward(self, *arguments, **others)
