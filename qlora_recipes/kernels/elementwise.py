"""Norms and gated MLPs that keep 16-bit inputs alone for the backward pass. Knows nothing of recipes or runs.

Transformers' RMSNorm keeps what it reads in float32 beside the 16-bit stream, and its MLP the activated gate beside the
gate. Both are made again here from what is kept, by the same operations, so that outputs are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qlora_recipes.families.outline import is_llama_mlp, is_llama_norm


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Any) -> torch.Tensor:
        """x [..., size] -> [..., size], normalized in float32."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        ctx.save_for_backward(x, scale)
        ctx.norm = norm
        y: torch.Tensor = norm.weight * (wide * scale).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, scale = ctx.saved_tensors
        normal = x.float() * scale
        d_normal = (d_y * ctx.norm.weight).to(x.dtype).float()
        share = (d_normal * normal).mean(-1, keepdim=True)
        return d_normal.addcmul_(normal, share, value=-1).mul_(scale).to(x.dtype), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gate and up [..., size] -> SiLU(gate) x up."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_y * up, gate), functional.silu(gate).mul_(d_y)


_normalize: Callable[..., torch.Tensor] = _RMSNorm.apply  # which torch does not annotate
_gated: Callable[..., torch.Tensor] = _Gated.apply


def _norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Take the place of `forward` in a norm whose weight is frozen."""
    y: torch.Tensor = type(self).forward(self, x) if self.weight.requires_grad else _normalize(x, self)
    return y


def _mlp_forward(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(_gated(self.gate_proj(x), self.up_proj(x)))


def fuse_norms_and_gates(model: nn.Module) -> int:
    """Give the functions above to every module whose `forward` is Llama's to the instruction; return how many.

    Mistral's, Qwen's and others' are; Gemma's norm, which adds one to its weight, is not.
    """
    found = 0
    for module in model.modules():
        if is_llama_norm(module):
            module.forward = MethodType(_norm_forward, module)
        elif is_llama_mlp(module):
            module.forward = MethodType(_mlp_forward, module)
        else:
            continue
        found += 1
    return found
