"""Measurements, one after the other, as they are asked for on standard input: a JSON object a line.

    {"what": "recipe", "specification": {...}, "result": "result.json"}

python -m qlora_recipes.experiments.gpu.measure
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_recipes import environment, standins
from qlora_recipes.base.device import release_memory
from qlora_recipes.commands.entry import run_command
from qlora_recipes.evaluation.held_out import row_losses
from qlora_recipes.experiments.gpu.bases import drawn_weights, write_base
from qlora_recipes.experiments.gpu.parts import FULL, SMALL
from qlora_recipes.experiments.throughput import arms, bound
from qlora_recipes.experiments.throughput.arms import SPECS, Specification, base_config
from qlora_recipes.kernels import attention as by_conversation
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.memory import estimate
from qlora_recipes.memory.sizes import sizes_of
from qlora_recipes.run.files import write_json
from qlora_recipes.training.accounting import non_weight_bytes
from qlora_recipes.training.build import load_model, prepare_rows

_CONVERSATIONS = (900, 500, 300, 200, 100, 48)
"""Tokens of the conversations that share a row: 2,048, as a packed row of Guanaco has them."""
_PEAKS = ("peak_bytes", "training_bytes", "used_bytes")
_SHOWN = 12
_TURNS = 7


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def base(spec: Specification) -> dict[str, Any]:
    """Write the base, whose weights are drawn when it is loaded."""
    scale = FULL if torch.cuda.is_available() else SMALL
    family = spec.family
    vocabulary = scale.vocab_size[family] or SPECS[family].sizes.vocab_size  # type: ignore[union-attr]  # both have sizes
    config = base_config(family, scale.hidden_size[family], scale.num_hidden_layers, vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(standins.STANDINS[family].folder, **SPECS[family].tokenizer)
    return {"bytes": write_base(config, tokenizer, Path(spec.model))}


def arm(name: str, spec: Specification) -> dict[str, Any]:
    """Train an arm; with the recipe's comes the bound of what it computed."""
    found = arms.run(name, spec)
    found["precision"] = spec.precision
    if name == "recipe":
        found["bound"] = bound.of_arm(spec.model, spec.dtype, found)
    return found


def attention(spec: Specification) -> dict[str, Any]:
    """Attend by conversation and by a mask over all pairs: milliseconds forward and backward, and how far apart."""
    sizes, where = sizes_of(Path(spec.model)), device()
    size = sizes.hidden_size // sizes.num_attention_heads
    lengths = _CONVERSATIONS if where.type == "cuda" else _CONVERSATIONS[-3:]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=where)
    tokens = sum(lengths)
    place = torch.arange(tokens, device=where)
    conversation = torch.bucketize(place, bounds[1:], right=True)
    mask = ((conversation[:, None] == conversation) & (place[:, None] >= place))[None, None]
    torch.manual_seed(0)
    heads = (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.num_key_value_heads)
    query, key, value = parts = [
        torch.randn(1, n, tokens, size, device=where, dtype=getattr(torch, spec.dtype), requires_grad=True)
        for n in heads
    ]
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]  # type: ignore[assignment]  # as Transformers' own modules have it
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "by conversation": lambda: by_conversation.attention(
            module, query, key, value, bounds, max_length_q=max(lengths)
        )[0],
        "a mask": lambda: sdpa_attention_forward(module, query, key, value, mask)[0],
    }
    outputs = {name: way().detach().float() for name, way in ways.items()}
    difference = (outputs["by conversation"] - outputs["a mask"]).abs().max()
    return {
        "heads": list(heads[:2]),
        "tokens": tokens,
        "conversations": len(lengths),
        "milliseconds": {name: _milliseconds(way, parts) for name, way in ways.items()},
        "largest_difference": float(difference),
    }


def evaluation(spec: Specification) -> dict[str, Any]:
    """Score rows as an evaluation does, as many at a time as it takes: tokens/s, and the peak beside the plan."""
    run = load_model(prepare_rows(arms.settings_of(replace(spec, storage="packed"))))
    fuse_lora_layers(run.model.eval())  # as a finished run is loaded
    rows, where = [row.encoded for row in run.data.train], run.model.device.type
    row_losses(cast(Any, run), rows[:1], 1)  # warms up
    beside = non_weight_bytes(run.model)
    environment.reset_peak(where)
    start = time.perf_counter()
    row_losses(cast(Any, run), rows, len(rows))  # as many as there is room for
    seconds = time.perf_counter() - start
    return {
        "positions": estimate.EVALUATED_POSITIONS,
        "rows": len(rows),
        "tokens_per_second": sum(len(row.input_ids) for row in rows) / seconds,
        "used_bytes": environment.peak_since_reset(where) - beside,
        "planned_bytes": estimate.plan(run.settings, device=where).evaluation.allocated,
    }


def _milliseconds(way: Callable[[], torch.Tensor], parts: Sequence[torch.Tensor]) -> float:
    gradient = torch.randn_like(way())
    taken = []
    for _ in range(_TURNS + 1):
        _wait()
        start = time.perf_counter()
        torch.autograd.grad(way(), parts, gradient)
        _wait()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _ThirdStep(TrainerCallback):
    """Profiles one step; the ones before it have warmed up."""

    def __init__(self) -> None:
        found = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profile = profile(activities=found)
        self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            _wait()
            self.profile.start()
            self.seconds = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            _wait()
            self.seconds = time.perf_counter() - self.seconds
            self.profile.stop()


def profiled(spec: Specification) -> dict[str, Any]:
    """Profile a step of the recipe: what takes longest, and how often the processor waits for the GPU."""
    clock = _ThirdStep()
    with tempfile.TemporaryDirectory() as folder:
        spec = replace(spec, steps=3)
        trainer = arms.trainer_of("recipe", spec, prepare_rows(arms.settings_of(spec)), folder)
        trainer.add_callback(clock)
        trainer.train()
    return {
        "seconds": clock.seconds,
        "micro_batches": trainer.args.gradient_accumulation_steps,
        **by_operator(clock.profile.key_averages(), on_gpu=torch.cuda.is_available()),
    }


def by_operator(averages: Sequence[Any], *, on_gpu: bool) -> dict[str, Any]:
    """Return what operators of PyTorch took, of the GPU where there is one; it lists their kernels a second time."""
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    called = [event for event in averages if event.device_type.name == "CPU"]
    longest = sorted(called, key=lambda event: -getattr(event, own))[:_SHOWN]
    waits = {"cudaStreamSynchronize", "cudaEventSynchronize"}  # the device is waited for here, around the step
    return {
        "milliseconds": {event.key: getattr(event, own) / 1000 for event in longest},
        "total_milliseconds": sum(getattr(event, own) for event in called) / 1000,
        "waits": sum(event.count for event in called if event.key in waits) if on_gpu else None,
    }


_MEASURES: dict[str, Callable[[Specification], dict[str, Any]]] = {
    "base": base,
    "attention": attention,
    "evaluation": evaluation,
    "profile": profiled,
}


def main(_: Sequence[str]) -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        what, spec, result = asked["what"], Specification(**asked["specification"]), Path(asked["result"])
        with drawn_weights():
            figures = _MEASURES[what](spec) if what in _MEASURES else arm(what, spec)
        release_memory()
        if not torch.cuda.is_available():  # whose memory is that of the whole process
            figures = {key: value for key, value in figures.items() if key not in _PEAKS}
        write_json(result, figures)


if __name__ == "__main__":
    run_command(main)
