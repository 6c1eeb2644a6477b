"""The base model, repaired, and counted after loading. The only place that loads a base.

Knows nothing of rows or training.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_recipes import environment
from qlora_recipes.base import repairs, sharding
from qlora_recipes.base.counting import count_matrices, count_quantized, parameters_by_storage, quantizable
from qlora_recipes.base.device import release_memory
from qlora_recipes.errors import ModelError, QuantizationError, SetupError
from qlora_recipes.families import FAMILIES
from qlora_recipes.kernels import attention
from qlora_recipes.kernels.dequantize import quant_state, row_scales
from qlora_recipes.kernels.experts import sort_parameters, stacks
from qlora_recipes.precision import Precision, quantization_config
from qlora_recipes.run.receipt import BaseReceipt
from qlora_recipes.settings import model_location

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_HTTP_ERROR = cast("type[Exception]", hub.HfHubHTTPError.__bases__[0])
"""Of the client that the hub's library uses; those without a `response` are of the connection."""
# Buffers that old checkpoints hold and a model computes by itself: of rotary positions, positions and causal masks.
_COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|(attn|attention)\.(bias|masked_bias))$")


def load_base(
    model: str,
    revision: str | None,
    precision: Precision,
    dtype: str,
    *,
    device: torch.device,
    divide: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, BaseReceipt, list[str]]:
    """Return the frozen base, what was counted in it, and the names of the repairs that were made.

    With `divide` this process keeps its shard of each weight, and `sharding.shard` has to follow.

    Raises:
        ModelError: when it cannot be loaded, or has weights that its configuration has no place for.
        QuantizationError: when the precision has no storage for what the model mostly consists of.
        SetupError: when the device cannot hold or compute in that precision.
    """
    _check_device(precision, dtype, device)
    release_memory()
    config = from_hub(AutoConfig.from_pretrained, model, revision, trust_remote_code=trust_remote_code)
    made: list[str] = []
    family = FAMILIES.get(config.model_type)
    if family and family.attention_repair:
        getattr(repairs, family.attention_repair)(attention.NAME)
    outline = _outline(config, trust_remote_code)  # here what quantization overlooks still counts as expected
    if outline is not None:
        _check_experts(model, outline, precision, divide)
        if repairs.separate_packed(outline):
            made.append("separate_packed")
    keeping = sharding.keeping_shards(device) if divide else contextlib.nullcontext()
    with keeping, repairs.quantize_experts(precision) as while_loading:
        base, loading = from_hub(
            AutoModelForCausalLM.from_pretrained,
            model,
            revision,
            dtype=getattr(torch, dtype),
            quantization_config=quantization_config(precision, dtype, divided=divide),
            device_map={"": device},
            use_safetensors=True,  # a pickle can run code when it is opened
            attn_implementation="sdpa" if getattr(config, "alibi", False) else attention.NAME,
            trust_remote_code=trust_remote_code,
            # Transformers before 5.18 would look for an adapter at the newest commit.
            adapter_kwargs={"revision": revision} if revision else {},
            output_loading_info=True,
        )
    made += while_loading
    sort_parameters(base)
    _check_unused(model, loading["unexpected_keys"])
    if outline is None:
        raise ModelError(f"{model} cannot be counted: its class cannot be made without weights. Use another model")
    if repairs.plain_linears(outline) and not precision.quantized and repairs.plain_linears(base):
        made.append("plain_linears")  # so that every precision computes alike
    if repairs.keep_4bit_gradients(base):
        made.append("keep_4bit_gradients")
    base.requires_grad_(False)
    base.config.use_cache = False
    receipt = _describe_base(base, outline, precision, model, revision, dtype)
    receipt.missing_keys = sorted(loading["missing_keys"])
    return base, receipt, made


def _check_experts(model: str, outline: PreTrainedModel, precision: Precision, divide: bool) -> None:
    """Refuse int8 for fused experts, which would stay in 16 bits, and FSDP for those in 4."""
    names = [name for name, _, _ in stacks(outline)]
    if names and precision.name == "int8":
        raise QuantizationError(
            f"--precision int8: {model} has {len(names)} stacks of fused experts ({names[0]}, ...), and bitsandbytes "
            "has int8 for linear layers alone: most of the model would stay in 16 bits. Use --precision nf4 or bf16"
        )
    if names and precision.quant_type and divide:
        raise QuantizationError(
            f"FSDP: {model} has {len(names)} stacks of fused experts ({names[0]}, ...), not to be divided in 4 bits. "
            "Use --precision bf16, or train without FSDP"
        )


def _check_unused(model: str, names: Iterable[str]) -> None:
    """Refuse a model that does not use all of its checkpoint; buffers that it computes by itself do not count."""
    unused = sorted(name for name in names if not _COMPUTED.search(name))
    if unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        raise ModelError(
            f"{model}: {len(unused)} weights of the checkpoint have no place in the model that config.json describes "
            f"({shown}). Expected the config.json that they were saved with: see num_hidden_layers in it"
        )


def check_reachable(model: str, revision: str | None) -> None:
    """Refuse a hub model that is not in the cache while the hub does not answer; the libraries try for a minute.

    Raises:
        ModelError: saying so.
    """
    location = model_location(model)
    if Path(location).exists() or constants.HF_HUB_OFFLINE:  # whose errors come at once
        return
    cached = try_to_load_from_cache(location, "config.json", revision=revision or "main")
    if not isinstance(cached, str) and not environment.hub_answers():
        raise ModelError(
            f"cannot load {location}: the hub ({constants.ENDPOINT}) cannot be reached, and the cache does not have "
            "it. Check the network, or give a folder (--model)"
        )


def load_outline(model: str, revision: str | None, *, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """Return the base without its weights, which takes no memory; None where `load_base` would say why it cannot be."""
    location = model_location(model)
    try:
        config = AutoConfig.from_pretrained(location, revision=revision or "main", trust_remote_code=trust_remote_code)
    except Exception:  # a damaged configuration may raise anything
        return None
    return _outline(config, trust_remote_code)


def _outline(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel | None:
    try:
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # as above
        return None
    return cast("PreTrainedModel", outline)


def from_hub(load: Any, model: str, revision: str | None, **kwargs: Any) -> Any:
    """Call a `from_pretrained`; if it fails, say in one sentence why."""
    location = model_location(model)
    kwargs["revision"] = revision or "main"
    try:
        try:
            return load(location, **kwargs)
        except _HTTP_ERROR as error:
            if hasattr(error, "response"):
                raise
            return load(location, local_files_only=True, **kwargs)  # transformers does so for some of these, not all
    except (OSError, ValueError, SafetensorError, _HTTP_ERROR) as error:
        raise ModelError(f"cannot load {location}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, hub.GatedRepoError):
            return "it is gated. Accept its terms on the hub, then run: hf auth login"
        if isinstance(link, hub.HfHubHTTPError) and link.response.status_code >= 429:
            return f"the hub answers {link.response.status_code}, again and again. Try later: downloads are kept"
        if isinstance(link, _HTTP_ERROR) and not hasattr(link, "response"):
            return f"the connection to the hub failed ({link}). Run the same command again: downloads are kept"
        link = link.__cause__ or link.__context__
    first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"{first}. Expected a hub id that can be reached, or a folder with config.json and safetensors (--model); "
        "weights in pickle (.bin, .pt) are never opened, because that can run code"
    )


def _check_device(precision: Precision, dtype: str, device: torch.device) -> None:
    if device.type == "cpu" and dtype == "float16":
        raise SetupError(
            "training in float16 needs CUDA: CPUs multiply float16 up to 1,000 times slower than bfloat16, and its "
            "gradients need a scaler that exists for GPUs only. Use --dtype bfloat16, or --precision bf16"
        )
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SetupError(f"{torch.cuda.get_device_name()} has no bfloat16; use --dtype float16, or --precision fp16")


def _describe_base(
    base: PreTrainedModel, outline: PreTrainedModel, precision: Precision, model: str, revision: str | None, dtype: str
) -> BaseReceipt:
    """Count what is in memory: matrices by class, parameters and bytes by storage, and a hash of all of it."""
    storage: Counter[str] = Counter()
    for _, tensor in stored_tensors(base):
        storage[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return BaseReceipt(
        model=model,
        revision=getattr(base.config, "_commit_hash", None) or revision,
        dtype=dtype,
        linears=count_matrices(base, outline),
        quantized=count_quantized(base, quantizable(outline) if precision.quantized else {}, precision),
        parameters=sum(parameter.numel() for parameter in outline.parameters()),
        bytes=storage.total(),
        bytes_by_storage=dict(storage),
        sha256=base_sha256(base),
        parameters_by_storage=parameters_by_storage(base),
    )


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the model as stored, quantization constants included; adapters are left out.

    Of a base that is divided among processes each is a DTensor.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" in name:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        state = quant_state(module) if name.endswith("weight") else getattr(tensor, "quant_state", None)
        yield name, sharding.stored(tensor, packed=state is not None)
        if state is not None:
            keys = ("absmax", "code", *(("state2.absmax", "state2.code", "offset") if state.nested else ()))
            yield from ((f"{name}.{key}", attrgetter(key)(state)) for key in keys)
        elif tensor.dtype == torch.int8:
            scales = row_scales(module)
            if scales is not None:
                yield f"{name}.SCB", scales


def base_sha256(model: nn.Module) -> str:
    """Return the hash of the stored bytes of a base, the same with and without an adapter around it.

    A base that is divided among processes has the same hash: each weight is gathered for it, one after the other.
    """
    if any(isinstance(tensor, DTensor) for _, tensor in stored_tensors(model)):
        return hashlib.sha256(b"".join(map(_tensor_sha256, stored_tensors(model)))).hexdigest()
    with ThreadPoolExecutor(max_workers=8) as threads:  # hashlib releases the interpreter: 3.6 GB at 2 GB/s each
        return hashlib.sha256(b"".join(threads.map(_tensor_sha256, stored_tensors(model)))).hexdigest()


def _tensor_sha256(named: tuple[str, torch.Tensor]) -> bytes:
    digest = hashlib.sha256(base_name(named[0]).encode())
    digest.update(raw_bytes(named[1]))
    return digest.digest()


def base_name(name: str) -> str:
    """Return the name that a base's module or tensor has without an adapter around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor of any dtype, gathered if it is divided among processes, for hashing."""
    return sharding.whole(tensor.detach()).contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
