"""An adapter written into a checkpoint's weights, one shard in memory at a time. Knows nothing of rows or scores.

A shard is read, the products of the adapter are added to the weights that it is on, and the shard is written under the
same name: W + s B A (arXiv 2106.09685), of DoRA m (W + s B A) / ||W + s B A|| (arXiv 2402.09353), computed in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qlora_recipes.base.adapters import ADAPTER
from qlora_recipes.base.device import torch_device
from qlora_recipes.base.loading import base_name
from qlora_recipes.errors import RunFolderError, UsageError
from qlora_recipes.kernels.dequantize import is_4bit
from qlora_recipes.precision import Precision

_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Update:
    """What an adapter does to one weight."""

    a: torch.Tensor
    """(rank, inputs), float32."""
    b: torch.Tensor
    """(outputs, rank), float32."""
    scaling: float
    transposed: bool = False
    """Whether the layer stores its weight as (inputs, outputs)."""
    magnitude: torch.Tensor | None = None
    """DoRA's, (outputs,)."""

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the updated weight in float32, on the weight's device."""
        a, b = self.a.to(weight.device), self.b.to(weight.device)
        plain = weight.float().T if self.transposed else weight.float()
        merged = plain + self.scaling * (b @ a)
        if self.magnitude is not None:
            merged *= (self.magnitude.to(weight.device) / merged.norm(dim=1)).view(-1, 1)
        return merged.T if self.transposed else merged


@dataclass(frozen=True)
class Changes:
    """What a merge changes in a checkpoint, by the names that weights have in it."""

    updates: Mapping[str, Update]
    replaced: Mapping[str, torch.Tensor]
    """Weights that were trained whole (`modules_to_save`)."""
    quantized: frozenset[str]
    """Weights that the run stored in 4 bits, with and without an adapter."""


def read_changes(model: Any, files: Mapping[str, Path]) -> Changes:
    """Return what the adapter on a loaded base changes in the checkpoint that the base is from.

    Raises:
        UsageError: naming what cannot be merged: a tensor of another kind of adapter, or a weight that the checkpoint
            does not have under its name, such as an output layer that is tied to the embedding.
    """
    updates: dict[str, Update] = {}
    replaced: dict[str, torch.Tensor] = {}
    quantized = set()
    known = set()
    for name, module in model.named_modules():
        weight = f"{base_name(name)}.weight"
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            updates[weight] = _update(module)
            if ADAPTER not in module.lora_variant or module.use_dora.get(ADAPTER):
                known |= {f"{name}.{part}.{ADAPTER}.weight" for part in _PARTS}
        elif isinstance(module, ModulesToSaveWrapper):
            saved = list(module.modules_to_save[ADAPTER].named_parameters())
            replaced |= {f"{base_name(name)}.{part}": tensor.detach().cpu() for part, tensor in saved}
            known |= {f"{name}.modules_to_save.{ADAPTER}.{part}" for part, _ in saved}
        elif is_4bit(module):
            quantized.add(weight)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in known:
            raise UsageError(
                f"the adapter trains {name}, which cannot be merged. Expected LoRA or DoRA on linear layers and "
                "modules_to_save; keep this adapter beside its base"
            )
    if lost := next((name for name in (*updates, *replaced, *quantized) if name not in files), None):
        raise UsageError(
            f"the checkpoint has no {lost}, which the merge would change; expected a checkpoint whose names are those "
            "of the model (an output layer that is tied to the embedding has none of its own)"
        )
    return Changes(updates, replaced, frozenset(quantized))


def _update(layer: Any) -> Update:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight if layer.use_dora.get(ADAPTER) else None
    return Update(
        a.detach().float().cpu(),
        b.detach().float().cpu(),
        float(layer.scaling[ADAPTER]),
        bool(layer.fan_in_fan_out),
        None if magnitude is None else magnitude.detach().float().cpu().reshape(-1),
    )


def quantized_and_back(weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Return a 16-bit weight as a 4-bit layer multiplies it, exactly as bitsandbytes stores and reads it."""
    from bitsandbytes import functional as stored

    packed, state = stored.quantize_4bit(
        weight.contiguous(), compress_statistics=precision.double_quant, quant_type=precision.quant_type
    )
    found: torch.Tensor = stored.dequantize_4bit(packed, state)
    return found


def merged_bytes(files: Mapping[str, Path], dtype: torch.dtype) -> int:
    """Return the size of a merged checkpoint, from the headers of its shards."""
    size = torch.empty(0, dtype=dtype).element_size()
    total = 0
    for file in set(files.values()):
        with safe_open(file, "pt") as shard:
            shapes = (shard.get_slice(name).get_shape() for name in shard.keys())  # noqa: SIM118  # no mapping
            total += sum(size * torch.Size(shape).numel() for shape in shapes)
    return total


@torch.no_grad()
def write_merged(
    files: Mapping[str, Path], changes: Changes, folder: Path, dtype: torch.dtype, *, through: Precision | None = None
) -> None:
    """Write every shard of a checkpoint with the adapter in it, in a 16-bit dtype.

    With `through` the weights that the run stored in 4 bits are first rounded to what those bits stand for.

    Raises:
        RunFolderError: when a shard cannot be read.
        OSError: when one cannot be written, as on a full disk.
    """
    folder.mkdir(parents=True)
    device = torch_device()  # quantized on the device it was trained on

    def changed(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name in changes.replaced:
            return changes.replaced[name].to(dtype).contiguous()
        if not weight.is_floating_point():
            return weight
        found = weight.to(dtype)
        if through is not None and name in changes.quantized:
            found = quantized_and_back(found.to(device), through)
        if name in changes.updates:
            found = changes.updates[name].applied(found.to(device))
        return found.to(device="cpu", dtype=dtype).contiguous()

    total = 0
    for shard in dict.fromkeys(files.values()):
        tensors = {name: changed(name, weight) for name, weight in _read(shard)}
        total += sum(tensor.nbytes for tensor in tensors.values())
        try:
            save_file(tensors, folder / shard.name, metadata={"format": "pt"})
        except SafetensorError as error:  # its own kind for a full disk
            raise OSError(str(error)) from error
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: file.name for name, file in files.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(shard, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # it is no mapping
                yield name, stored.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{shard} cannot be read: {error}. Download the base again") from error


def write_configuration(source: Path, folder: Path, dtype: str, end: int) -> None:
    """Write what `from_pretrained` reads beside the weights: the base's configuration, its code, and where to stop."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # what older versions call it
    _write(folder / "config.json", config | {"dtype": dtype})
    own = source / "generation_config.json"
    generation = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    stops = generation.get("eos_token_id", [])
    stops = [stops] if isinstance(stops, int) else stops or []
    ends = list(dict.fromkeys([end, *stops]))
    _write(folder / "generation_config.json", generation | {"eos_token_id": ends[0] if len(ends) == 1 else ends})
    for code in source.glob("*.py") if "auto_map" in config else ():
        shutil.copyfile(code, folder / code.name)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
