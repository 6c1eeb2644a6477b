"""A linear layer with its LoRA update in one function, without copies of its input. Knows nothing of recipes or runs.

PEFT casts the input of each adapter to float32, autocast casts it back, scaling and adding are passes of their own, and
each adapter keeps its own copy for the backward pass. Here the product itself adds the update, the input is kept once,
and a quantized weight is dequantized once in each direction for both. The adapter's weights stay float32; products are
in 16 bits, as under autocast.

y = x W^T + s (x A^T) B^T (arXiv 2106.09685, section 4.1), its gradient for a frozen W. DoRA (arXiv 2402.09353, section
4.1) multiplies each output by its gain, m / ||W + s B A||, whose norm gets no gradient (section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from qlora_recipes.kernels.blocked import times_transposed, times_weight
from qlora_recipes.kernels.dequantize import is_4bit, weight_of
from qlora_recipes.kernels.experts import adapt


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """x [tokens, inputs], a [rank, inputs], b [outputs, rank] -> [tokens, outputs]."""
        down, up = a.to(x.dtype), (b * scaling).to(x.dtype)
        reduced = nn.functional.linear(x, down)
        y = times_weight(x, layer)
        y.addmm_(reduced, up.T)
        ctx.save_for_backward(x, reduced, a, b)
        ctx.layer, ctx.scaling = layer, scaling
        return y

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, reduced, a, b = ctx.saved_tensors
        down, up = a.to(x.dtype), (b * ctx.scaling).to(x.dtype)
        d_reduced = d_y @ up
        d_a = (d_reduced.T @ x).to(a.dtype)
        d_b = (reduced.T @ d_y).T.to(b.dtype).mul_(ctx.scaling)  # on a CPU in half the time of d_y.T @ reduced
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = times_transposed(d_y, ctx.layer)
            d_x.addmm_(d_reduced, down)
        return d_x, None, d_a, d_b, None


_apply: Callable[..., torch.Tensor] = _LoraLinear.apply  # which torch does not annotate


def _forward(self: Any, x: torch.Tensor, *arguments: Any, **others: Any) -> torch.Tensor:
    """Take the place of `forward` in a LoraLayer, which PEFT types as no module."""
    name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
    half = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    by_peft = self.disable_adapters or self.merged or arguments or others or half == torch.float32
    if by_peft or not _is_plain(self, name):
        return cast(torch.Tensor, type(self).forward(self, x, *arguments, **others))
    layer, scaling = self.get_base_layer(), self.scaling[name]
    y: torch.Tensor
    with torch.autocast(x.device.type, enabled=False):
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        # bitsandbytes has kernels that never write the weight out, and round differently: not while training, where a
        # pass without gradients (the reference of preferences, a checkpointed layer) stands beside one with them
        if is_4bit(layer) and not torch.is_grad_enabled() and not self.training:
            x = x.to(half)
            y = layer(x) + (x @ a.to(half).T) @ (b * scaling).to(half).T
        else:
            y = _apply(x.to(half).flatten(0, -2), layer, a, b, scaling).unflatten(0, x.shape[:-1])
        if name in self.lora_variant:
            product = y if layer.bias is None else y - layer.bias
            # Added to y in float32: a gain near 1 has steps of 0.4 % in bfloat16, and one of exactly 1 changes nothing.
            y = (y + (_gain(self, name, layer) - 1) * product).to(half)
    return y


def _gain(self: Any, name: str | None, layer: nn.Linear) -> torch.Tensor:
    """Return DoRA's magnitudes by the norms of the weights that they scale, [outputs], in float32."""
    with torch.no_grad():
        whole = self.scaling[name] * self.lora_B[name].weight @ self.lora_A[name].weight
        whole += weight_of(layer, torch.float32)
        norm = torch.linalg.norm(whole, dim=1)
    return cast(torch.Tensor, self.lora_magnitude_vector[name].weight / norm)


def fuse_lora_layers(model: nn.Module) -> int:
    """Give every plain LoRA or DoRA layer on a 16-bit or 4-bit linear layer the function above; return how many.

    An adapter of 4-bit experts gets its own way, without which it does not train (experts.py).

    PEFT keeps dropout, other variants, biases, and int8, whose product belongs to its library; and, at each
    call, several adapters, none, merged ones, and computing in float32. FSDP2 gathers the weights of a block, which are
    whole here.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            adapt(wrapper)
    adapted = (module for module in model.modules() if isinstance(module, LoraLayer))
    plain = [layer for layer in adapted if _is_plain(layer, layer.active_adapters[0])]
    for layer in plain:
        layer.forward = MethodType(_forward, layer)
    return len(plain)


def _is_plain(layer: LoraLayer, name: str | None) -> bool:
    base = layer.get_base_layer()
    return (
        isinstance(base, nn.Linear)
        and name is not None
        and name in layer.lora_A
        and base.weight.dtype != torch.int8
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and isinstance(layer.lora_variant.get(name), DoraLinearVariant | None)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )
