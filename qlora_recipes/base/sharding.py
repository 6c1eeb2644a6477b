"""A base that FSDP2 divides among processes, each of which keeps a shard of every weight from when it is read.

PyTorch's `fully_shard` gathers a layer's weights when the layer computes and frees them afterwards. Accelerate calls it
when training starts, and until then each process would hold the whole base. Here a weight is divided as soon as it is
loaded and quantized, so that a process never holds more than its shards and one weight. Knows nothing of runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import core_model_loading, modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_recipes import environment
from qlora_recipes.errors import ModelError, UsageError
from qlora_recipes.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel

_PLAIN_STARTS = (True, "gaussian")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is divided among processes gathered on each of them, any other as it is.

    All processes must call this together, and in the same order.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divides() -> bool:
    """Whether this process is one of several that FSDP was asked to divide a base among."""
    return environment.sharding_asked() == "FSDP" and distributed.is_initialized()


@functools.cache
def _all_processes(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (distributed.get_world_size(),))


def refuse_unsupported(settings: Settings) -> None:
    """Refuse what cannot be done, or would be done wrongly, where FSDP divides the base.

    Raises:
        UsageError: naming the setting, and what to set instead.
    """
    if environment.sharding_asked() != "FSDP":
        return
    lora, precision = settings.lora, settings.precision
    start, optimizer = lora.get("init_lora_weights", True), str(settings.training.get("optim", ""))
    parts = "needs whole weights of the base, and each process has parts"
    faults = [
        (_is_on("OFFLOAD_PARAMS"), "--fsdp_offload_params true: expected false, weights stay on the GPUs"),
        (_is_on("ACTIVATION_CHECKPOINTING"), "--fsdp_activation_checkpointing: give --gradient_checkpointing true"),
        (precision.name == "int8", "--precision int8: its weights cannot be divided; expected nf4 or bf16"),
        (
            settings.storage in ("expanded", "blocked"),
            f"--storage {settings.storage}: whole weights are kept beside the parts; expected packed",
        ),
        (start not in _PLAIN_STARTS, f"--init_lora_weights {start}: {parts}; expected true"),
        (lora.get("use_dora"), f"--use_dora: {parts}; leave it out"),
        (lora.get("modules_to_save"), f"lora: modules_to_save: {parts}; leave it out"),
        (lora.get("target_parameters"), "lora: target_parameters: adapters of experts are not divided; leave it out"),
        (settings.of_preferences, "method dpo: the reference adapter is not divided; train without FSDP"),
        ("bit" in optimizer, f"--optim {optimizer}: its state cannot be divided; expected adamw_torch"),
    ]
    if found := [fault for holds, fault in faults if holds]:
        raise UsageError(f"FSDP: {'; '.join(found)}")


def _is_on(name: str) -> bool:
    """Whether `accelerate launch` was told so by a line of its FSDP config."""
    return os.environ.get(f"FSDP_{name}", "").lower() in ("true", "1")


@contextlib.contextmanager
def keeping_shards(device: torch.device) -> Iterator[None]:
    """Keep of every weight that Transformers loads only this process's shard.

    A weight keeps its shape and class for what is built around it (an adapter, counts), but has no memory until `shard`
    puts its part in place. Every process reads and quantizes each weight, so that none waits for another.

    Transformers 5.23, `modeling_utils.py`, leaves the weights of all but the first process empty where accelerate's
    config says `fsdp_cpu_ram_efficient_loading`, and does so for 16-bit bases only; reads ahead in threads, which hold
    whole weights; and reserves the memory of a whole base on a GPU.
    """
    mesh = _all_processes(device.type)
    set_whole = core_model_loading.set_param_for_module

    def set_shard(model: Any, target_name: str, *arguments: Any, **others: Any) -> None:
        set_whole(model, target_name, *arguments, **others)
        path, _, name = target_name.rpartition(".")
        weight = dict(model.get_submodule(path).named_parameters(recurse=False)).get(name)
        if weight is not None and not weight.is_meta:
            _keep_shard(weight, mesh)

    reading = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    with (
        mock.patch.dict(os.environ, reading),
        mock.patch.object(core_model_loading, "set_param_for_module", set_shard),
        mock.patch.object(modeling_utils, "caching_allocator_warmup", lambda *_: None),
    ):
        yield


def _keep_shard(weight: Any, mesh: DeviceMesh) -> None:
    """Take a weight's memory away, and keep this process's rows of it as `shards`."""
    rows: torch.Tensor = weight.data
    parts, rank = rows.chunk(mesh.size()), mesh.get_local_rank()
    part = (parts[rank] if rank < len(parts) else rows[:0]).clone(memory_format=torch.contiguous_format)
    weight.shards = DTensor.from_local(
        part, mesh, [Shard(0)], run_check=False, shape=rows.shape, stride=rows.contiguous().stride()
    )
    weight.data = torch.empty(1, dtype=rows.dtype, device=rows.device).expand(rows.shape)


def stored(weight: torch.Tensor, *, packed: bool) -> torch.Tensor:
    """Return a weight as it is stored, of which each process may have a shard; 4-bit weights as bytes.

    FSDP gathers no bytes, so where it divides 4-bit weights bitsandbytes stores them under the name of a 16-bit dtype.
    """
    found: torch.Tensor = getattr(weight, "shards", weight.data)
    if not packed or found.dtype == torch.uint8:
        return found
    if not isinstance(found, DTensor):
        return found.view(torch.uint8)
    part = found.to_local().view(torch.uint8)
    rows, width = found.shape[0], found.element_size()
    return DTensor.from_local(
        part, found.device_mesh, found.placements, run_check=False, shape=torch.Size((rows, width)), stride=(width, 1)
    )


def shard(model: PeftModel) -> None:
    """Hand base and adapter to FSDP, layer by layer, and the shards that were kept of the base.

    FSDP casts nothing: it gathers each weight in its own dtype, and autocast computes as without it. Accelerate's
    policy rounds what the model returns to 16 bits, the loss as well, and one that reduces in another dtype than the
    gradients' fails where they are accumulated.

    Raises:
        ModelError: when the model has no layers that can be told apart.
    """
    base: Any = model.get_base_model()
    mesh = _all_processes(base.device.type)
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"FSDP: {type(base).__name__} has no layers of Transformers' kind to divide it by")
    embeddings, output = base.get_input_embeddings(), base.get_output_embeddings()
    if embeddings.weight is not output.weight:  # else the output layer needs them to the end
        layers.append(embeddings)
    places = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if hasattr(weight, "shards")
    ]
    _replace(places, lambda weight: torch.empty_like(weight, device="meta"))  # FSDP takes no memory for these
    policy: Any = {"mp_policy": MixedPrecisionPolicy(), "shard_placement_fn": _placement(mesh.size())}
    for module in (*layers, model):
        # Also what is in no layer, which would else stay whole after a pass that no backward pass follows.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, **policy)
    _replace(places, lambda weight: weight.shards)


def _placement(processes: int) -> Any:
    """Divide an adapter's A by its columns: it may have fewer rows than there are processes."""

    def place(weight: nn.Parameter) -> Shard | None:
        wide = weight.ndim == 2 and weight.shape[0] < weight.shape[1] and weight.shape[1] % processes == 0
        return Shard(1) if wide and weight.requires_grad else None

    return place


def _replace(places: list[tuple[nn.Module, str, Any]], make: Any) -> None:
    """Put another parameter in the place of each, the same one wherever a weight is shared."""
    made: dict[int, nn.Parameter] = {}
    for module, name, weight in places:
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(make(weight), requires_grad=False)
        module.register_parameter(name, made[id(weight)])
