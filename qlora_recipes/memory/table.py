"""Prints what a run would do and the memory it would take in every precision, before anything is loaded.

Imports no torch.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_recipes.memory.estimate import EVALUATED_POSITIONS, GIB, Memory, largest_micro_batch, plan
from qlora_recipes.memory.fitting import USABLE, Machine, fit_to_memory
from qlora_recipes.memory.ranks import spread
from qlora_recipes.memory.sizes import adapter_parameters, described, sizes_for
from qlora_recipes.memory.workload import Workload, left_out, workload_of
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.run.display import figures_table
from qlora_recipes.settings import Settings

_LABELS = {name: name for name in Memory("").parts} | {
    "expanded": "base in 16 bits",
    "cache": "keys, values",
    "logits": "logits, loss",
    "context": "CUDA context",
}


_REPORTED: dict[float, float] = {16: 14.5, 24: 22, 32: 31, 40: 39, 48: 44, 80: 79}
"""GB that cards are sold with, to the GiB that PyTorch reports of those with the least: 14.7 of a T4, 22 of an A10G or
L4, 44.5 of an L40S, 39.5 and 79.1 of an A100."""


def print_plan(
    settings: Settings,
    *,
    gpu_gib: float | None = None,
    processes: int | None = None,
    console: Console | None = None,
) -> None:
    """Print what would run and the memory of every precision by part; of several processes the first one's.

    With several processes and the memory of a GPU, print also how the run can be spread over them.

    Raises:
        ModelError: when the model's dimensions cannot be had.
        UsageError: for a GPU of no size.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    console, sold = console or Console(), gpu_gib
    gpu_gib = _REPORTED.get(gpu_gib, gpu_gib) if gpu_gib is not None else None
    # A recipe is planned for a GPU, whichever machine prints the plan; a demo is planned for this machine.
    here = settings.demo and gpu_gib is None and shutil.which("nvidia-smi") is None
    device, processes = "cpu" if here else "cuda", processes or int(os.environ.get("WORLD_SIZE", "1"))
    if gpu_gib is not None and 0 < gpu_gib < math.inf:
        settings = fit_to_memory(settings, Machine(device, int(USABLE * gpu_gib * GIB), processes))
    work = workload_of(settings, device, processes)
    console.print(_run_table(settings, work))
    console.print()
    console.print(_memory_table(settings, work, gpu_gib))
    if gpu_gib != sold:
        console.print(Text(f"PyTorch reports as little as {gpu_gib:g} GiB of cards that are sold with {sold:g} GB."))
    for line in _remarks(settings, work, gpu_gib):
        console.print(Text(line))
    if processes > 1 and gpu_gib is not None:
        console.print()
        for part in spread(settings, work, gpu_gib):
            console.print(part, soft_wrap=isinstance(part, Text))


def _run_table(settings: Settings, work: Workload) -> Table:
    """What a user checks before a run."""
    sizes, every = sizes_for(settings), work.checkpoint_every
    steps, epochs = settings.training.get("max_steps", -1), settings.training.get("num_train_epochs", 3)
    trained = adapter_parameters(sizes, work.rank, work.targets, work.experts)
    batch = work.rows * work.accumulation * work.processes
    return figures_table(
        {
            "recipe": settings.name,
            "model": settings.model,
            **described(sizes),
            "dataset": settings.dataset_name,
            "precision": f"{settings.precision.name}, loaded and computed in {settings.dtype}",
            "global batch": f"{batch} rows = {work.rows} a micro-batch x {work.accumulation} accumulated "
            f"x {work.processes} process{'' if work.processes == 1 else 'es'}",
            "rows": f"up to {work.length:,} tokens, {'packed' if work.packing else 'padded'}",
            "steps": f"{steps:,}" if steps > 0 else f"{epochs:g} epoch{'' if epochs == 1 else 's'} of the rows",
            "checkpointing": {0: "off", 1: "every layer"}.get(every, f"one layer in {every}"),
            "adapter": f"rank {work.rank} on {', '.join(work.targets)}: {trained:,} weights",
            "run folder": str(settings.output_dir),
        }
    )


def _memory_table(settings: Settings, work: Workload, gpu_gib: float | None) -> Table:
    """One row for each part, one column for each precision; the run's own is bold."""
    plans = [plan(settings, each, device=work.device, processes=work.processes) for each in PRECISIONS.values()]
    large = max(each.training.total for each in plans) >= GIB  # a stand-in is not
    unit, name = (GIB, "GiB") if large else (2**20, "MiB")
    where = "a process on a CPU" if work.device == "cpu" else "each GPU"
    table = Table(title=Text(f"Memory of {where}, {name}"), title_justify="left", box=None, padding=(0, 1))
    table.add_column(Text("training"), no_wrap=True)
    for each in plans:
        own = each.precision == settings.precision
        table.add_column(Text(each.precision.name), justify="right", style="bold" if own else "")
    _add_parts(table, [each.training for each in plans], unit)
    if gpu_gib is not None:
        sizes = sizes_for(settings)
        fits = [largest_micro_batch(sizes, each.precision, work, gpu_gib) or "none" for each in plans]
        table.add_row(Text(f"rows in {gpu_gib:g} GiB"), *(Text(str(rows)) for rows in fits))
    table.add_row()
    table.add_row(Text("evaluation", style="bold"))
    _add_parts(table, [each.evaluation for each in plans], unit)
    return table


def _add_parts(table: Table, memories: Sequence[Memory], unit: int) -> None:
    for part, label in _LABELS.items():
        amounts = [memory.parts[part] for memory in memories]
        if any(amounts):
            table.add_row(Text(label), *(Text(f"{amount / unit:.2f}") for amount in amounts))
    totals = (Text(f"{memory.total / unit:.2f}") for memory in memories)
    table.add_row(Text("total"), *totals, style="bold")


def _remarks(settings: Settings, work: Workload, gpu_gib: float | None) -> Iterable[str]:
    """Where memory peaks, the flags that fill the GPU with the same global batch, and what the plan leaves out."""
    own = plan(settings, device=work.device, processes=work.processes)
    yield (
        f"Training in {own.precision.name} peaks at the {own.training.moment}; "
        f"evaluation when {own.evaluation.moment}, {max(EVALUATED_POSITIONS, work.length):,} tokens at a time."
    )
    if gpu_gib is not None:
        rows = largest_micro_batch(sizes_for(settings), own.precision, work, gpu_gib)
        batch = work.rows * work.accumulation
        most = max((size for size in range(1, min(rows, batch) + 1) if batch % size == 0), default=0)
        if rows == 0:
            yield (
                f"Not one row fits {gpu_gib:g} GiB in {own.precision.name}: lower --max_length or --r"
                f"{', or use --precision nf4' * (own.precision.name != 'nf4')}."
            )
        elif most > work.rows:
            yield (
                f"The same global batch in larger micro-batches: --per_device_train_batch_size {most} "
                f"--gradient_accumulation_steps {batch // most}"
            )
    if sizes_for(settings).counted:
        yield "The base is counted. What a step adds is an estimate: its rules were fitted to Llama and Falcon."
    if uncounted := left_out(settings):
        yield f"Not counted: {', '.join(uncounted)}."
