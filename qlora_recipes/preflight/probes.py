"""Small batches of the run's own rows, one pass of them through the model as in training, and no trace of it left.

Knows nothing of verdicts.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy
import torch
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_recipes.base.sharding import whole
from qlora_recipes.data.encoding import IGNORED, Encoded
from qlora_recipes.kernels.dequantize import outlier_threshold
from qlora_recipes.stages import Run

PROBE_TOKENS = 64  # of each of two rows: a thousandth of a real step's work
# Of how far a changed conversation's own logits move: GPUs add in another order each time. A leak between conversations
# measured 0.1 and more.
NOISE = 1e-3


@contextlib.contextmanager
def preserving_state(model: nn.Module | None) -> Iterator[None]:
    """Let a probe draw random numbers, run passes and change modes without changing the training that follows."""
    modes = {module: module.training for module in model.modules()} if model is not None else {}
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # named, or several make PyTorch warn
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        for module, training in modes.items():
            module.training = training
        if model is not None:
            model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def without_outlier_columns(model: nn.Module) -> Iterator[bool]:
    """Let int8 layers quantize every column of their input, outliers included; yield whether there are such layers."""
    layers: list[Any] = [module for module in model.modules() if outlier_threshold(module)]
    thresholds = [layer.state.threshold for layer in layers]
    try:
        for layer in layers:
            layer.state.threshold = 0.0
        yield bool(layers)
    finally:
        for layer, threshold in zip(layers, thresholds, strict=True):
            layer.state.threshold = threshold


def probe_batch(run: Run) -> dict[str, Any]:
    """Return the shortest two rows, or windows of them around the start of their answer, collated as in training."""
    shortest = numpy.argsort(run.data.figures["length"], kind="stable")[:2]
    return collate(run, [_window(run.data.train[int(i)].encoded) for i in shortest])


def _window(row: Encoded) -> Encoded:
    answer = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    start = max(0, min(answer - PROBE_TOKENS // 2, len(row.labels) - PROBE_TOKENS))
    return Encoded(row.input_ids[start : start + PROBE_TOKENS], row.labels[start : start + PROBE_TOKENS])


def collate(run: Run, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Return rows as the trainer's collator hands them to the model, on its device."""
    collator = run.trainer.data_collator
    if run.settings.of_preferences:  # whose collator takes pairs: here one conversation is a row, as in any loss
        collator = DataCollatorForLanguageModeling(pad_token_id=int(cast(int, run.tokenizer.pad_token_id)))
    batch = collator([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    device = run.trainer.args.device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def forward(run: Run, batch: dict[str, Any]) -> Any:
    """Return the model's output for a batch, under the autocast of training."""
    with run.trainer.compute_loss_context_manager():
        return run.model(**batch, use_cache=False)


@torch.no_grad()
def logits(run: Run, batch: dict[str, Any]) -> torch.Tensor:
    """Return float32 logits in evaluation mode, [rows, positions, vocabulary]."""
    run.model.eval()
    found: torch.Tensor = forward(run, batch).logits
    return found.float()


def trainer_loss(run: Run, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss that trains, as the trainer and its kernels compute it; of preferences, that of the model."""
    torch.manual_seed(0)  # the same dropout in every probe; put back by `preserving_state`
    run.model.train()
    of_model = run.settings.of_preferences  # whose loss takes pairs
    loss: torch.Tensor = forward(run, batch).loss if of_model else cast(Any, run.trainer).probe_loss(batch)
    return loss


def gradients(run: Run, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return name to gradient of every weight that has one after a pass in training mode."""
    run.model.zero_grad(set_to_none=True)
    trainer_loss(run, batch).backward()
    found = {name: whole(weight.grad) for name, weight in run.model.named_parameters() if weight.grad is not None}
    run.model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether a model takes conversations that share a row, and the second is the same whatever the first one is.

    Convolutions and states along time, as in LFM2 or Mamba, mix them, or refuse such rows without a kernel for GPUs.
    """
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    found = []
    with preserving_state(model), without_outlier_columns(model):
        first, changed, second = torch.randint(1, model.config.vocab_size, (3, 16)).tolist()
        model.eval()
        for part in (first, changed):
            batch = collator([{"input_ids": ids, "labels": ids} for ids in (part, second)])
            given = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
            try:
                found.append(model(**given, use_cache=False).logits[0].float())
            except (TypeError, ValueError):  # as Transformers raises for a model that would mix them
                return False
    own, other = (float(part.abs().max()) for part in (found[0] - found[1]).tensor_split([len(first)]))
    return other <= NOISE * own
