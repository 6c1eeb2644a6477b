"""The plan for a GPU against a count of every storage of a step of 7B shapes, on tensors that have no memory.

What runs is what runs on a GPU: TRL's output layer, FlashAttention by conversation, bitsandbytes' dequantization.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_memory import SPECS, configuration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, masking_utils
from trl.kernels import chunked_logprob
from trl.trainer import utils

from qlora_recipes.base import repairs
from qlora_recipes.base.adapters import attach
from qlora_recipes.kernels import attention
from qlora_recipes.kernels.dequantize import expand
from qlora_recipes.kernels.elementwise import fuse_norms_and_gates
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.memory.estimate import training_memory
from qlora_recipes.memory.workload import Workload
from qlora_recipes.precision import PRECISIONS


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are made from now on and are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: WeakIdKeyDictionary[Any, bool] = WeakIdKeyDictionary()
        for each in gc.get_objects():
            if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "meta":
                self._seen[each.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor and args[1][-1].dtype == torch.bool:  # all of which are true here
            made = args[0].flatten(0, 1).clone()
        elif func is torch.ops.aten.index_put_.default or func is torch.ops.aten._index_put_impl_.default:
            made = args[0]
        else:
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _free(self, size: int) -> None:
        self.bytes -= size


class _Kernel:
    """A Triton kernel that does nothing, in place as the one that it stands for."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors without memory take the ways of a GPU with FlashAttention, and autocast to bfloat16."""

    def layer_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Any:
        return norm(x.float(), shape, weight.float(), bias.float(), eps)

    norm = torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", layer_norm)  # autocast's list for CUDA has it
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(attention, "_has_flash", lambda query: True)
    monkeypatch.setattr(chunked_logprob, "_use_triton", lambda device: True)
    for kernel in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(chunked_logprob, kernel, _Kernel())
    monkeypatch.setattr(chunked_logprob, "triton", SimpleNamespace(cdiv=lambda *_: 1), raising=False)
    monkeypatch.setattr(chunked_logprob, "_addmm_fp32", lambda *_: None)  # in place
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", torch.zeros_like)


def _memory_efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, **_: Any) -> torch.Tensor:
    """The fused kernel of a GPU without FlashAttention, which meta tensors do not choose by themselves."""
    assert q.shape == k.shape == v.shape
    output: torch.Tensor
    output, *_others = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, True, scale=scale
    )
    return output


def quantize(model: torch.nn.Module) -> None:
    """Store the linear layers of the blocks as bitsandbytes does: packed, with constants that are quantized in turn."""
    from bitsandbytes import functional

    for name, layer in model.named_modules():
        if name.rsplit(".")[-1] == "base_layer":
            packed, state = functional.quantize_4bit(layer.weight.data, compress_statistics=True, quant_type="nf4")
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
            layer.weight.quant_state = state


def step_bytes(family: str, precision: str, work: Workload, layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the most bytes that a step adds to weights and optimizer, by a count of every storage."""
    config = configuration(family)
    config.num_hidden_layers = layers
    if family == "falcon":
        repairs.route_falcon_attention(attention.NAME)
    if work.older_gpu:
        monkeypatch.setattr(attention, "_has_flash", lambda query: False)
        monkeypatch.setattr(attention, "_is_older_gpu", lambda query: True)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _memory_efficient)
    bounds = torch.arange(work.rows + 1, dtype=torch.int32) * work.length
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, attention.NAME, lambda *_, **__: bounds)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    base.requires_grad_(False)
    utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model = attach(base, {"r": work.rank, "lora_alpha": 8, "target_modules": list(work.targets)}, 0)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    if precision == "nf4":
        quantize(model)
    if work.storage == "expanded":
        expand(model, torch.bfloat16)
    fuse_lora_layers(model)
    fuse_norms_and_gates(model)
    model.train()
    if work.checkpoint_every:
        base.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=work.checkpoint_every)
    ids = torch.empty(1, work.tokens, dtype=torch.long, device="meta")
    lengths = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=work.length, max_length_k=work.length)
    with Alive() as alive:
        for _ in range(work.accumulation):
            found = model(input_ids=ids, position_ids=ids, labels=ids, fused_lm_head=True, **lengths)
            loss = found.loss
            del found
            loss.backward()
            del loss
    return alive.peak


SETTINGS = [
    (family, precision, given)
    for family in SPECS
    for precision, given in (
        ("nf4", dict(rows=2, length=1024)),
        ("nf4", dict(rows=2, length=1024, checkpoint_every=0, storage="expanded")),
        ("nf4", dict(rows=2, length=1024, checkpoint_every=0, older_gpu=True)),
        ("bf16", dict(rows=1, length=2048, checkpoint_every=0)),
        ("bf16", dict(rows=4, length=1024, checkpoint_every=2, accumulation=2)),
    )
]


@pytest.mark.parametrize("layers", [4, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "precision", "given"), SETTINGS)
def test_a_step_takes_what_is_planned(
    family: str, precision: str, given: dict[str, Any], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workload(rank=16, targets=SPECS[family].linear_layers, **given)
    sizes = replace(SPECS[family].sizes, num_hidden_layers=layers)
    planned = training_memory(sizes, PRECISIONS[precision], work)
    counted = step_bytes(family, precision, work, layers, monkeypatch)
    of_step = sum(planned.parts[part] for part in ("gradients", "activations", "logits", "workspace"))
    assert of_step == pytest.approx(counted, rel=0.03)
    assert planned.allocated == pytest.approx(planned.allocated - of_step + counted, rel=0.013)
