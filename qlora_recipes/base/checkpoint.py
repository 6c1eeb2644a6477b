"""A checkpoint's weights as they are on disk, read in slices, and how far a loaded base is from them.

Knows nothing of runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from qlora_recipes.base.loading import base_name
from qlora_recipes.base.sharding import whole
from qlora_recipes.kernels.dequantize import dequantized
from qlora_recipes.kernels.experts import stored_name
from qlora_recipes.settings import model_location

_WEIGHTS = "model.safetensors"


def weight_files(model: str, revision: str | None) -> Mapping[str, Path]:
    """Return weight name to the safetensors file that holds it, of a checkpoint that was loaded on this machine."""
    if index := _file(model, revision, f"{_WEIGHTS}.index.json"):
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / part for name, part in names.items()}
    if whole := _file(model, revision, _WEIGHTS):
        with safe_open(whole, "pt") as stored:
            return dict.fromkeys(stored.keys(), whole)
    return {}


def _file(model: str, revision: str | None, name: str) -> Path | None:
    found = cached_file(
        model_location(model),
        name,
        revision=revision or "main",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


@torch.no_grad()
def layer_errors(
    model: nn.Module, files: Mapping[str, Path], dtype: torch.dtype, *, sample: int | None = None
) -> Iterator[tuple[str, float]]:
    """Yield name and relative error of each linear layer but the output layer, and of each 4-bit stack of experts.

    The error is the Frobenius norm of (stored - original) over that of the original, which is the checkpoint's weight
    in the 16-bit `dtype` that it was loaded in. With `sample` only so many weights of a layer are compared, those of
    its first rows. Layers whose name is not in the checkpoint are left out. Stacks of experts have another name there,
    and other shapes: their error was taken when they were quantized, of the first expert.
    """
    for name, weight in model.named_parameters():
        if hasattr(weight, "error"):
            yield base_name(stored_name(name)), weight.error
    output = model.get_output_embeddings()  # type: ignore[operator]  # every causal language model has it
    for name, module in model.named_modules():
        key = f"{base_name(name)}.weight"
        if not isinstance(module, nn.Linear) or module is output or "lora_" in name or key not in files:
            continue
        rows = None if sample is None else max(1, sample // module.in_features)
        with safe_open(files[key], "pt") as checkpoint:
            saved = checkpoint.get_slice(key)
            turned = getattr(module, "source_cls", None) is Conv1D  # [inputs, outputs], as GPT-2 stores them
            original = (saved[:, :rows].T if turned else saved[:rows]).to(dtype).float()
        stored = dequantized(module, whole(module.weight.data))[:rows].float().cpu()
        yield base_name(name), float((stored - original).norm() / original.norm())
