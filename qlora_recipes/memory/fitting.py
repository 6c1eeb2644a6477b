"""Settings that a recipe leaves open, chosen to fit the machine: micro-batch, checkpointing, storage. Imports no torch.

The global batch stays what the recipe says, and so does the loss; only how much is computed at a time changes. All
precisions of one dtype get the micro-batch that the 16-bit base allows, so that the arms of a comparison stay alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_recipes.errors import ModelError
from qlora_recipes.families.family import Sizes
from qlora_recipes.memory.estimate import GIB, training_memory
from qlora_recipes.memory.sizes import sizes_for
from qlora_recipes.memory.workload import Workload, left_out, workload_of
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.settings import Settings

ENOUGH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a micro-batch beyond which a token takes no less time, or on a CPU more, for more memory. Rows
that are not packed count as a quarter of the longest, as conversations do."""
FIXED_TOKENS = 200
"""Tokens that take as long as dequantizing the base forward and backward, which every micro-batch does: 0.41 ns a
weight against 845 GFLOP/s on a CPU with 16-bit products, 0.52 ps against 790 TFLOP/s on an H200."""
USABLE = 0.9
"""Share of the memory that a plan may fill; fragments and libraries take the rest."""
_CHECKPOINTING = (0, 4, 2, 1)
"""Off, or every n-th layer: with fewer layers to compute again, a step is faster and takes more memory."""


@dataclass(frozen=True)
class Machine:
    """What one process of a run has to itself."""

    device: str
    """`cuda` or `cpu`."""
    bytes: int
    """Memory that the process may fill."""
    processes: int = 1
    """Of the whole run."""
    sharded: bool = False
    """Whether FSDP divides the model among them, which this plan does not cover (`ranks.py` does)."""
    blocks: bool = False
    """Whether it is a CPU that multiplies in bfloat16, by weights that were laid out for it (`kernels/blocked.py`)."""


def fit_to_memory(settings: Settings, machine: Machine) -> Settings:
    """Return the settings with nothing left open.

    Where the memory of a run cannot be planned (see `workload.left_out`; unknown dimensions), or not even one row
    fits, the library's defaults decide.
    """
    storage = "packed" if settings.storage == "auto" else settings.storage
    settled = replace(settings, storage=storage, auto_fields=frozenset())
    if left_out(settings) or machine.sharded:
        return settled
    try:
        sizes, asked = sizes_for(settings), workload_of(settled, machine.device, machine.processes)
    except ModelError:  # loading raises it with a better message
        return settled
    work = _fastest_that_fits(sizes, settings, asked, machine) or asked
    training = dict(settings.training)
    if "batch" in settings.auto_fields:
        training |= {"per_device_train_batch_size": work.rows, "gradient_accumulation_steps": work.accumulation}
    if "checkpointing" in settings.auto_fields:
        training["gradient_checkpointing"] = work.checkpoint_every > 0
        if work.checkpoint_every > 1:
            training["gradient_checkpointing_kwargs"] = {"every_n_layers": work.checkpoint_every}
    if settings.storage == "auto":
        ways = (replace(work, storage=storage) for storage in _storages(sizes, settings, machine))
        fits = (way for way in ways if training_memory(sizes, settings.precision, way).total <= machine.bytes)
        settled = replace(settled, storage=next((way.storage for way in fits), "packed"))
    return replace(settled, training=training)


def _storages(sizes: Sizes, settings: Settings, machine: Machine) -> Iterator[str]:
    """Yield the ways to keep weights that take more memory than `packed` and less time, the fastest first."""
    in_bfloat16 = settings.dtype == "bfloat16" and settings.precision.name != "int8"
    if machine.blocks and in_bfloat16 and sizes.linears == sizes.weights:  # experts are no linear layers
        yield "blocked"
    if settings.precision.quant_type is not None:
        yield "expanded"


def _fastest_that_fits(sizes: Sizes, settings: Settings, asked: Workload, machine: Machine) -> Workload | None:
    """Return the fastest workload that fits, with a 16-bit base too if one does, or None."""
    even = next(each for each in PRECISIONS.values() if each.dtype == settings.dtype)
    ways = (
        work
        for precisions in ((even, settings.precision), (settings.precision,))
        for work in _workloads(settings, asked)
        if all(training_memory(sizes, each, work).total <= machine.bytes for each in precisions)
    )
    return next(ways, None)


def _workloads(settings: Settings, asked: Workload) -> Iterator[Workload]:
    """Yield the ways to divide a step into micro-batches, the fastest first."""
    batch = asked.rows * asked.accumulation
    every = _CHECKPOINTING if "checkpointing" in settings.auto_fields else (asked.checkpoint_every,)
    typical = asked.length if settings.training.get("packing") else max(1, asked.length // 4)
    sizes = [asked.rows]
    if "batch" in settings.auto_fields:
        enough = max(1, ENOUGH_TOKENS[asked.device] // typical)
        sizes = [rows for rows in range(min(batch, enough), 0, -1) if batch % rows == 0]
    ways = [(checkpoint_every, rows) for checkpoint_every in every for rows in sizes]
    for checkpoint_every, rows in sorted(ways, key=lambda way: _cost(way[0], way[1] * typical)):
        yield replace(asked, rows=rows, accumulation=batch // rows, checkpoint_every=checkpoint_every)


def _cost(checkpoint_every: int, tokens: int) -> float:
    """Return the time of a token as a multiple of the shortest; computing a layer again takes half as long."""
    return (1 + (0.5 / checkpoint_every if checkpoint_every else 0)) * (1 + FIXED_TOKENS / tokens)


def describe(settings: Settings, machine: Machine) -> str:
    """Return in one line what a fitted run computes at a time and its planned memory; empty if there is no plan."""
    if machine.sharded:
        return ""
    try:
        work = workload_of(settings, machine.device, machine.processes)
        memory = training_memory(sizes_for(settings), settings.precision, work)
    except ModelError:
        return ""
    checkpointing = {0: "no checkpointing", 1: "every layer checkpointed"}.get(
        work.checkpoint_every, f"one layer in {work.checkpoint_every} checkpointed"
    )
    name = settings.precision.name.upper().replace("-SINGLE", "")
    weights = f"{name} {settings.storage}, " if settings.precision.quant_type or settings.storage != "packed" else ""
    return (
        f"{work.rows} x {work.accumulation} rows a step, {checkpointing}, {weights}"
        f"{memory.total / GIB:,.2f} GiB planned of {machine.bytes / GIB:,.1f}"
    )
