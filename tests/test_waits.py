"""Training waits for the GPU only where it must: a step of ours reads a figure from it once, not in every layer."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from preflight_runs import ready
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import ChunkedLogProbFunction

import qlora_recipes
from qlora_recipes import Recipe
from qlora_recipes.kernels import attention, output_layer
from qlora_recipes.training.trainer import ExactResume

PACKAGE, TORCH = (str(Path(module.__file__).parent) for module in (qlora_recipes, torch))
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}
CALLS = {"tolist", "cpu", "numpy"}  # which a CPU does without an operator


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU, by step and by the function that did it; ours and that of libraries."""

    def __init__(self, step: Callable[[], int]) -> None:
        super().__init__()
        self.step = step
        self.ours: Counter[tuple[int, str]] = Counter()
        self.of_libraries = 0

    def note(self) -> None:
        for frame in frames():
            file = frame.f_code.co_filename
            if not file.startswith((TORCH, __file__)) and "contextlib" not in file:
                if file.startswith(PACKAGE):
                    self.ours[self.step(), frame.f_code.co_name] += 1
                else:
                    self.of_libraries += 1
                return

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITS or any(index is not None and index.dtype == torch.bool for index in indices):
            self.note()
        return function(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Tells `Waits` of what a CPU does without an operator."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in CALLS:
            self.waits.note()
        return function(*args, **(kwargs or {}))


def frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame := frame.f_back:
        yield frame


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Stand in for PyTorch's kernel, [tokens, heads, size], and wait for nothing."""
    conversation = torch.bucketize(torch.arange(len(query)), bounds[1:].long(), right=True)
    mask = (conversation[:, None] == conversation[None]).tril()
    parts = [part.transpose(0, 1)[None] for part in (query, key, value)]
    found = functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
    return found[0].transpose(0, 1)


@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_a_step_reads_the_gpu_once(
    family: str,
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_has_flash", lambda query: True)
    monkeypatch.setattr(attention, "varlen_attn", flash)
    monkeypatch.setattr(output_layer, "LogProbs", ChunkedLogProbFunction)  # a GPU's, in place of the CPU's
    monkeypatch.setattr(attention, "_splits", {})
    monkeypatch.setattr(attention, "SHORT", 32)  # rows of few tokens keep a mask
    steps = dict(max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1)
    run = ready(
        recipe_for(family), tiny(family), tmp_path, training={**steps, "packing": False, "gradient_checkpointing": True}
    )
    trainer = run.trainer
    assert isinstance(trainer, ExactResume)
    waits = Waits(lambda: trainer.state.global_step)

    with waits, Calls(waits):
        trainer.train()
    assert waits.of_libraries > 0
    first = {name for step, name in waits.ours if step == 0}
    assert first == {"_get_grad_norm", "_asked_bounds", "_bounds"}  # whether the mask is what the collator says
    later = {key: count for key, count in waits.ours.items() if key[0] in (1, 2)}
    assert {name for _, name in later} == {"_get_grad_norm"}
    assert max(later.values()) <= 2  # the losses and the norm, one right after the other
