"""Fused experts in 4 bits: a stack [experts, ., .] that is dequantized when its module computes, and not kept.

A parametrization of PyTorch's dequantizes the stack where the module reads it, so every implementation of experts that
Transformers has multiplies by it. Knows nothing of recipes or runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

_PACKED = re.compile(r"parametrizations\.(\w+)\.original")


class Dequantize(nn.Module):
    """From a 4-bit parameter to the 16-bit stack that it stands for."""

    expanded_weight: torch.Tensor | None = None
    """The stack itself, where there is memory for both; it belongs to no state dict."""

    update: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What an adapter adds to the stack while its module computes."""

    def forward(self, packed: Any) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        stack = self.expanded_weight
        if stack is None:
            stack = dequantize_4bit(packed.data, packed.quant_state)
        return stack if self.update is None else self.update(stack)


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
        module.forward = MethodType(_forward, module)  # of this module alone


def _forward(self: Any, *arguments: Any, **others: Any) -> Any:
    """Compute with each stack dequantized once, and dequantized anew for the gradient instead of kept for it."""
    stacks = [chain[0] for chain in self.parametrizations.values()]
    adapted = any(stack.update is not None for stack in stacks)  # which is gone when the gradient is computed
    expanded = any(stack.expanded_weight is not None for stack in stacks)
    inside = getattr(self.owner[0], "gradient_checkpointing", False)
    if adapted or expanded or inside or not (self.training and torch.is_grad_enabled()):
        return _compute(self, *arguments, **others)
    return checkpoint(_compute, self, *arguments, use_reentrant=False, **others)


def _compute(self: Any, *arguments: Any, **others: Any) -> Any:
    with parametrize.cached():
        return type(self).forward(self, *arguments, **others)


def adapt(wrapper: Any) -> None:
    """Have PEFT's adapter of a stack hand its update to what dequantizes the stack, where it is in 4 bits.

    PEFT 0.21 would put a parametrization of its own behind the one that is there. It does not take it away again, and
    of two parameters of a module that are adapted it trains one, because it reads the other from a cache too early.
    """
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    if not parametrize.is_parametrized(base, name):
        return
    like = torch.empty(0, dtype=getattr(base, name).dtype, device=base.parametrizations[name].original.device)
    wrapper.get_param = lambda: like  # PEFT asks for its dtype and device alone; the stack need not be dequantized
    wrapper.forward = MethodType(_adapted, wrapper)


def _adapted(self: Any, x: torch.Tensor, *arguments: Any, **others: Any) -> Any:
    names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
    stack = self.get_base_layer().parametrizations[self.parameter_name][0]
    stack.update = _Update(*self.get_delta_factors(names[0])) if names else None
    try:
        return self.base_layer(x, *arguments, **others)
    finally:
        stack.update = None


@dataclass(frozen=True)
class _Update:
    """Adds scaling x left x right to a stack, in the dtype of the stack."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float

    def __call__(self, stack: torch.Tensor) -> torch.Tensor:
        with torch.autocast(stack.device.type, enabled=False):
            return torch.baddbmm(stack, self.left, self.right, alpha=self.scaling)


def full_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the full name of each parameter that ends with one of the names, as PEFT must be told those in 4 bits.

    PEFT 0.21 leaves out the adapters that are around a parameter, but not around one in 4 bits.
    """
    found = []
    for name, _ in model.named_parameters():
        full, packed = _PACKED.subn(r"\1", name)
        plain = full.replace(".base_layer", "")
        if any(f".{plain}".endswith(f".{target}") for target in targets):
            found.append(full if packed else plain)
    return sorted(found)


def sort_parameters(model: nn.Module) -> None:
    """Put the parameters of modules with stacks into the order of their names.

    PEFT nests the adapters of one module in the order of its parameters, and in that of their names where these are in
    4 bits: otherwise an adapter would be called differently on another base.
    """
    for owner in {module for _, module, _ in stacks(model)}:
        for name, weight in sorted(owner.named_parameters(recurse=False)):
            delattr(owner, name)
            setattr(owner, name, weight)
