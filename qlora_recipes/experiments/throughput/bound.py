"""The fastest that this machine could train, from a product and a copy measured in the same run. Knows nothing of arms.

Every linear layer takes 4 flop per token and weight without checkpointing (2 forward, 2 for the gradient of its input;
the weight is frozen), the output layer as many for each supervised token. A packed 4-bit base is also dequantized
twice per micro-batch, half a byte read and two written for each weight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_recipes.families.family import Sizes
from qlora_recipes.memory.sizes import linear_parameters, sizes_of

_TURNS = 9
_TOKENS = 2048
_COPIED = 2**28  # bytes, more than any cache


@dataclass(frozen=True)
class Machine:
    """What was measured on it."""

    flops: float
    """Flop per second in 16-bit products of an MLP's shape, forward and backward."""
    copied: float
    """Bytes that a copy reads and writes per second."""


def measure(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the machine with the shapes of a model."""
    x = torch.randn(_TOKENS, sizes.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(sizes.intermediate_size, sizes.hidden_size, device=device, dtype=dtype)
    y = x @ weight.T
    flop = 2 * _TOKENS * weight.numel()
    forward, backward = _seconds(lambda: x @ weight.T, device), _seconds(lambda: y @ weight, device)
    source = torch.empty(_COPIED, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return Machine(2 * flop / (forward + backward), 2 * _COPIED / _seconds(lambda: target.copy_(source), device))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median of several runs after one that does not count; a GPU gets many at a time."""
    taken, launches = [], 50 if device.type == "cuda" else 1
    for _ in range(_TURNS + 1):
        start = time.perf_counter()
        for _ in range(launches):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - start) / launches)
    return statistics.median(taken[1:])


def tokens_per_second(machine: Machine, sizes: Sizes, supervised_share: float, packed_tokens: float | None) -> float:
    """Return the bound; `packed_tokens` are the tokens of a micro-batch if 4-bit weights are dequantized for each."""
    linears = linear_parameters(sizes)
    head = sizes.vocab_size * sizes.hidden_size * supervised_share
    seconds = 4 * (linears + head) / machine.flops
    if packed_tokens:
        seconds += 2 * 2.5 * linears / machine.copied / packed_tokens
    return 1 / seconds


def of_arm(model: str, dtype: str, recipe: Mapping[str, Any]) -> dict[str, float]:
    """Return the bound for what the recipe's arm computed on a base, and what it follows from, as a report has them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(recipe["threads"])
    sizes = sizes_of(Path(model))
    machine = measure(sizes, device, getattr(torch, dtype))
    share = recipe["supervised_tokens_per_second"] / recipe["tokens_per_second"]
    packed = recipe["quantized_linears"] and recipe["storage"] == "packed"
    tokens = recipe["tokens_per_micro_batch"] if packed else None
    return {"tokens_per_second": tokens_per_second(machine, sizes, share, tokens), **vars(machine)}
