"""Adapters that start from the base's own weights, which stay as they are: PiSSA, OLoRA and LoftQ.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) train a part s B A of a weight W that starts as s B0 A0, and
freeze the rest. PEFT writes the rest into the base, rounded to its dtype: another base in each precision, to which the
adapter is bound. Here the same function, W + s (B A - B0 A0), is an adapter of twice the rank on a base that stays: A
is followed by A0 and B by -B0, which get no gradient. It is what PEFT makes of such an adapter to share it.

LoftQ (arXiv 2310.08659, one step on a base that is quantized already) starts as the best approximation of what
quantizing took away. PEFT's `replace_lora_weights_loftq` does so on a GPU, for a scaling of 1.

All are computed from the checkpoint. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from qlora_recipes.base.checkpoint import weight_files
from qlora_recipes.base.loading import base_name
from qlora_recipes.errors import ModelError, RecipeError
from qlora_recipes.kernels.dequantize import dequantized

if TYPE_CHECKING:
    from peft import PeftModel


def takes_a_part(start: object) -> bool:
    """Whether an `init_lora_weights` begins by taking a part of each weight away: PiSSA's and OLoRA's."""
    return str(start).startswith("pissa") or start == "olora"


def from_weights(start: object) -> bool:
    """Whether this module computes an `init_lora_weights`."""
    return takes_a_part(start) or start == "loftq"


def peft_fields(lora: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields for PEFT: of a plain adapter, for PiSSA and OLoRA of twice the rank and the same scaling.

    So says the saved configuration: whoever loads the adapter must not start it again.
    """
    start = lora.get("init_lora_weights", True)
    if not from_weights(start):
        return dict(lora)
    plain = {**lora, "init_lora_weights": True}
    if takes_a_part(start):
        alpha = 2**0.5 if lora.get("use_rslora") else 2
        plain.update(r=2 * lora.get("r", 8), lora_alpha=alpha * lora.get("lora_alpha", 8))
        for pattern, factor in (("rank_pattern", 2), ("alpha_pattern", alpha)):
            plain[pattern] = {key: factor * value for key, value in (lora.get(pattern) or {}).items()}
    return plain


@torch.no_grad()
def start_from_weights(model: PeftModel, start: str, revision: str | None) -> None:
    """Set the adapter's first weights, and freeze the half that takes a part of the base away.

    Raises:
        RecipeError: when a rank is larger than a layer's.
        ModelError: when the checkpoint does not name an adapted layer.
    """
    for layer, weight in _layers(model, revision):
        name = layer.active_adapters[0]
        a, b, rank = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.r[name]
        if takes_a_part(start):
            rank //= 2
        if start == "loftq":
            weight -= dequantized(layer.get_base_layer()).float()
        if rank > min(weight.shape):
            raise RecipeError(f"lora: r: got {rank}, expected at most {min(weight.shape)} for a start from the weights")
        up, down = _factors(weight, start, rank, layer.scaling[name])
        if takes_a_part(start):
            up, down = torch.cat([up, -up], dim=1), torch.cat([down, down])
            a.register_hook(lambda gradient, rank=rank: _without_second_half(gradient, 0, rank))
            b.register_hook(lambda gradient, rank=rank: _without_second_half(gradient, 1, rank))
        a.copy_(down)
        b.copy_(up)


def _factors(weight: torch.Tensor, start: str, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B0 [outputs, rank] and A0 [rank, inputs]; scaling times their product is the part, as PEFT has it.

    OLoRA's factors do not depend on the scaling (PEFT's `olora_init`).
    """
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]
    if "_niter_" in start:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(start.rpartition("_")[2]))
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _without_second_half(gradient: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return torch.cat([gradient.narrow(dim, 0, rank), torch.zeros_like(gradient.narrow(dim, rank, rank))], dim)


@torch.no_grad()
def distance_from_checkpoint(model: PeftModel, revision: str | None) -> tuple[float, float]:
    """Return the mean relative error of the adapted layers as stored, and with the adapter added."""
    stored, adapted = [], []
    for layer, weight in _layers(model, revision):
        name, base, norm = layer.active_adapters[0], dequantized(layer.get_base_layer()).float(), weight.norm()
        update = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
        stored.append(float((weight - base).norm() / norm))
        adapted.append(float((weight - base - update).norm() / norm))
    return sum(stored) / len(stored), sum(adapted) / len(adapted)


def _layers(model: PeftModel, revision: str | None) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield each adapted linear layer with its weight in the checkpoint, rounded to the run's dtype, in float32."""
    base: Any = model.base_model.model
    files = weight_files(base.name_or_path, revision)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        linear, key = layer.get_base_layer(), f"{base_name(name)}.weight"
        if key not in files or not isinstance(linear, nn.Linear):
            raise ModelError(f"init_lora_weights: the checkpoint of {base.name_or_path} has no linear layer {key}")
        with safe_open(files[key], "pt") as checkpoint:
            yield layer, checkpoint.get_tensor(key).to(base.dtype).float().to(linear.weight.device)
