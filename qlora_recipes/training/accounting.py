"""What training did, counted when it has ended: the adapter's, training's and memory's sections of the receipt.

Changes nothing of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from accelerate import PartialState
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from qlora_recipes import environment
from qlora_recipes.base.adapters import ADAPTER, adapted_modules, adapter_sha256, adapter_tensors, tensor_hashes
from qlora_recipes.base.loading import stored_tensors
from qlora_recipes.base.sharding import divides, local
from qlora_recipes.base.starts import takes_a_part
from qlora_recipes.errors import ModelError
from qlora_recipes.kernels.blocked import blocked_bytes
from qlora_recipes.kernels.dequantize import EXPANDED
from qlora_recipes.memory import ranks
from qlora_recipes.preflight.preferences import mean_margins
from qlora_recipes.run.receipt import AdapterReceipt, MemoryReceipt, TrainingReceipt
from qlora_recipes.stages import Run
from qlora_recipes.training.token_count import TokenCount
from qlora_recipes.training.trainer import ExactResume


def describe_adapter(run: Run, initial: str, before: Mapping[str, bytes]) -> AdapterReceipt:
    """Return the adapter as it is now, compared with its `tensor_hashes` before the first step."""
    after = dict(adapter_tensors(run.model))
    modules = adapted_modules(run.model)
    layers = {name: cast(LoraLayer, run.model.get_submodule(name)) for name in modules}
    ranks = Counter(str(layer.r[ADAPTER]) for layer in layers.values())
    frozen_half = takes_a_part(run.settings.lora.get("init_lora_weights"))
    return AdapterReceipt(
        targets=sorted({getattr(layer, "parameter_name", name.rsplit(".")[-1]) for name, layer in layers.items()}),
        modules=len(modules),
        parameters=sum(tensor.numel() for tensor in after.values()) // (2 if frozen_half else 1),
        dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in after.values()})),
        initial_sha256=initial,
        final_sha256=adapter_sha256(run.model),
        all_finite=all(bool(torch.isfinite(tensor).all()) for tensor in after.values()),
        unchanged=[name for name, digest in tensor_hashes(run.model).items() if digest == before[name]],
        bytes=0,
        ranks=dict(sorted(ranks.items())),
    )


def describe_training(trainer: ExactResume) -> TrainingReceipt:
    """Return how far training got and how fast, over all its sessions; to be called when the last step is done."""
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    losses = losses or [entry["train_loss"] for entry in log if "train_loss" in entry]  # no step was logged: their mean
    tail = losses[-max(1, len(losses) // 10) :]
    device, seconds = trainer.args.device, trainer.seconds
    counts = torch.tensor(list(asdict(trainer.count.read()).values()), device=device)
    total = TokenCount(*trainer.accelerator.reduce(counts, "sum").tolist())
    return TrainingReceipt(
        steps=trainer.state.global_step,
        micro_batches=total.micro_batches,
        epochs=float(trainer.state.epoch or 0),
        first_loss=losses[0],
        final_loss=sum(tail) / len(tail),
        tokens=total.real,
        supervised_tokens=total.supervised,
        padding_share=1 - total.real / total.positions,
        tokens_per_second=total.real / seconds,
        seconds=seconds,
        packed=bool(getattr(trainer.args, "packing", False)),
        processes=trainer.accelerator.num_processes,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        attention=cast(PreTrainedModel, trainer.model).config._attn_implementation,
        margins=mean_margins(trainer.state.log_history),
        optimizer_state=optimizer_state(trainer.optimizer),
        skipped_steps=trainer.skipped_steps,
    )


def optimizer_state(optimizer: Any) -> dict[str, int]:
    """Return dtype to bytes of an optimizer's tensors; those that the driver can move to the host are `paged`."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()  # accelerate wraps it
    held = (local(part) for state in states for part in state.values() if torch.is_tensor(part))
    parts = {part.data_ptr(): part for part in held}
    found: Counter[str] = Counter()
    for part in parts.values():  # bitsandbytes shares its tables
        paged = " paged" if getattr(part, "is_paged", False) else ""
        found[str(part.dtype).removeprefix("torch.") + paged] += part.nbytes
    return dict(sorted(found.items()))


def describe_memory(run: Run, held: int) -> MemoryReceipt:
    """Return the peak memory of this session, and without the bytes held before the first step besides weights."""
    device = run.trainer.args.device.type
    return MemoryReceipt(
        peak_bytes=max(environment.peak_bytes(device), run.base_bytes),
        base_bytes=run.base_bytes,
        training_bytes=environment.peak_since_reset(device) - held,
        planned_bytes=_planned(run, device),
        reserved_bytes=environment.reserved_bytes(device),
    )


def non_weight_bytes(model: torch.nn.Module) -> int:
    """Return the memory in bytes that this process holds now besides the weights of a model."""
    kept = (getattr(module, EXPANDED, None) for module in model.modules())
    tensors = [tensor for _, tensor in stored_tensors(model)] + [tensor for tensor in kept if tensor is not None]
    tensors += [weight for weight in model.parameters() if weight.requires_grad]
    device = tensors[0].device.type
    stored = sum(int(local(tensor).nbytes) for tensor in tensors) + blocked_bytes(model)
    return environment.resident_bytes(device) - stored


def _planned(run: Run, device: str) -> int | None:
    try:
        return ranks.planned(run.settings, device, PartialState().num_processes, divided=divides()).allocated
    except ModelError:
        return None
