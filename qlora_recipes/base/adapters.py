"""LoRA adapters: attach one to a base, describe it, and load one from disk. Knows nothing of training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

from qlora_recipes.base import repairs
from qlora_recipes.base.loading import raw_bytes
from qlora_recipes.base.sharding import whole
from qlora_recipes.base.starts import from_weights, peft_fields, start_from_weights
from qlora_recipes.errors import ModelError, RecipeError, nearest
from qlora_recipes.kernels.experts import full_names, stored_name
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.run.weights import weights_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"


def attach(base: PreTrainedModel, lora: Mapping[str, Any], seed: int, revision: str | None = None) -> PeftModel:
    """Return the base, which stays as it is, with a new float32 adapter, the same for every precision of one seed.

    A start from the weights (starts.py) reads the checkpoint at `revision`; an outline without weights goes without.
    LoftQ's, and DoRA's magnitudes, follow from how the base is stored.

    PEFT gives an adapter the dtype of its layer and casts it to float32 afterwards: on a 16-bit base the first weights
    are rounded, on a 4-bit base they are not. Here they are drawn again in float32, right after seeding.

    Raises:
        RecipeError: when a module, a parameter or a layer that is named is not in the model, or carries no adapter.
        ModelError: when a start from the weights does not find them in the checkpoint.
    """
    _check_names(base, lora)
    repairs.float32_dora_norm()
    if lora.get("target_parameters"):
        lora = {**lora, "target_parameters": full_names(base, lora["target_parameters"])}
    set_seed(seed)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **peft_fields(lora)))
    initialization = lora.get("init_lora_weights", True)
    set_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer) and initialization in (True, "gaussian"):
            module.reset_lora_parameters(ADAPTER, initialization)  # type: ignore[no-untyped-call]  # not annotated
    if from_weights(initialization) and base.device.type != "meta":
        start_from_weights(model, initialization, revision)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in lora.get(field) or ():
            if not any(re.fullmatch(rf"(.*\.)?({key})", name) for name in adapted_modules(model)):  # as PEFT does
                raise RecipeError(f"lora: {field}: got {key!r}, expected the name of a module that carries the adapter")
    return model


def _check_names(base: PreTrainedModel, lora: Mapping[str, Any]) -> None:
    """Refuse unknown modules and layers; PEFT accepts a list if one name matches and silently ignores the others."""
    modules = dict(base.named_modules())
    linears = sorted({name.split(".")[-1] for name, module in modules.items() if isinstance(module, nn.Linear)})
    parameters = {stored_name(name) for name, _ in base.named_parameters()}
    for field in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        names, known = lora.get(field) or (), parameters if field == "target_parameters" else modules
        for name in () if isinstance(names, str) else names:
            if not any(f".{each}".endswith(f".{name}") for each in known):
                raise RecipeError(
                    f"lora: {field} names {name!r}, which {type(base).__name__} does not have; its linear "
                    f"layers are {', '.join(linears)}.{nearest(str(name), linears)}"
                )
    layers, count = lora.get("layers_to_transform"), base.config.num_hidden_layers
    for layer in layers if isinstance(layers, (list, tuple)) else () if layers is None else (layers,):
        if not 0 <= layer < count:
            raise RecipeError(f"lora: layers_to_transform: got {layer}, expected layers from 0 to {count - 1}")


def adapter_tensors(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the trainable weights in a fixed order, named as in the model; each process has to take all of them."""
    return ((name, whole(weight.data)) for name, weight in sorted(model.named_parameters()) if weight.requires_grad)


def adapter_sha256(model: PeftModel, *, without: str | None = None) -> str:
    """Return the SHA-256 over names, shapes and bytes of the adapter's weights, which differs when one bit does.

    Tensors with `without` in their name are left out.
    """
    return weights_sha256(
        (name, tensor.shape, str(tensor.dtype).removeprefix("torch."), raw_bytes(tensor))
        for name, tensor in adapter_tensors(model)
        if without is None or without not in name
    )


def tensor_hashes(model: PeftModel) -> dict[str, bytes]:
    """Return name to SHA-256 of each trainable weight: what tells whether it has changed, with no copy of it."""
    return {name: hashlib.sha256(raw_bytes(tensor)).digest() for name, tensor in adapter_tensors(model)}


def adapted_modules(model: PeftModel) -> list[str]:
    """Return the full names of the modules that carry the adapter."""
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def set_weights(model: PeftModel, folder: Path) -> None:
    """Set the adapter's weights to those saved in a folder."""
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=ADAPTER)


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Return the base with a saved adapter, unmerged, in float32 as it was trained.

    Raises:
        ModelError: when the folder holds no adapter in safetensors, or one for another base.
    """
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"no adapter at {folder}: {WEIGHTS} is missing. Expected the adapter/ folder of a finished run"
        )
    repairs.float32_dora_norm()
    try:
        # Trainable, so that `adapter_tensors` sees the weights and their hash can be compared with the receipt.
        model = PeftModel.from_pretrained(base, folder, adapter_name=ADAPTER, is_trainable=True, use_safetensors=True)
    except Exception as error:  # a damaged file makes PEFT and safetensors raise anything
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"the adapter at {folder} does not fit this base: {first}") from error
    fuse_lora_layers(model)
    return model


def add_adapter(model: PeftModel, folder: Path, name: str) -> Any:
    """Put one more saved adapter on a base, frozen and in float32; return the names that PEFT misses or did not expect.

    PEFT 0.21 knows a parameter in 4 bits that carries an adapter by another name, would leave out what is saved for it,
    and wants all adapters to give the same names.
    """
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    saved = set(config.target_parameters or ())
    known: list[Any] = list(model.peft_config.values())
    alike = [config, *(each for each in known if saved and saved == set(each.target_parameters or ()))]
    plain = [each.target_parameters for each in alike]
    try:
        for each in alike:
            each.target_parameters = full_names(model.get_base_model(), list(saved)) or None
        model.add_adapter(name, config)
    finally:
        for each, names in zip(alike, plain, strict=True):
            each.target_parameters = names
    return model.load_adapter(str(folder), name, use_safetensors=True)
