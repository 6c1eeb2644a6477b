"""What each of several processes needs of a GPU, where DDP copies the base to all of them or FSDP divides it.

DDP divides nothing but the batch. FSDP2 (`base/sharding.py`) divides base, adapter and optimizer by layer and gathers a
layer while it computes; the constants of 4-bit weights stay whole, since they are no parameters. Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora_recipes.families.family import Sizes
from qlora_recipes.memory.estimate import CUDA_CONTEXT, GIB, Memory, moments, optimizer_bytes, training_memory
from qlora_recipes.memory.fitting import USABLE
from qlora_recipes.memory.sizes import linear_parameters, sizes_for, unquantized_parameters
from qlora_recipes.memory.step import Step, base_bytes
from qlora_recipes.memory.workload import Workload, workload_of
from qlora_recipes.precision import PRECISIONS, Precision
from qlora_recipes.settings import Settings

_LAUNCH = {"DDP": "recipes/launch/ddp.yaml", "FSDP": "recipes/launch/fsdp_qlora.yaml"}
_MOST_ROWS = 256


@dataclass(frozen=True)
class Way:
    """One way to spread a run over GPUs, and what each of them needs."""

    wrapper: str
    """`DDP` or `FSDP`."""
    precision: Precision
    training: Memory
    """With micro-batches of one row."""
    loading: int
    """Bytes at the peak of loading the base, when one weight is whole in 16 bits."""
    rows: int
    """The largest micro-batch that fits, among powers of two; 0 where not even one row does."""


def ways(sizes: Sizes, own: Precision, work: Workload, gpu_gib: float) -> list[Way]:
    """Return how a workload can be spread over its processes: by DDP and FSDP, in its own precision, NF4 and bf16."""
    precisions = dict.fromkeys((own, PRECISIONS["nf4"], PRECISIONS["bf16"]))
    work = replace(work, checkpoint_every=1, storage="packed")  # what takes the least memory
    return [
        _way(sizes, wrapper, precision, work, USABLE * gpu_gib * GIB)
        for wrapper in _LAUNCH
        for precision in precisions
        if wrapper == "DDP" or precision.name != "int8"  # which FSDP cannot divide
    ]


def _way(sizes: Sizes, wrapper: str, precision: Precision, work: Workload, usable: float) -> Way:
    memory_of = training_memory if wrapper == "DDP" else sharded_memory
    one = memory_of(sizes, precision, replace(work, rows=1))
    loading, rows = one.base + _whole_weight(sizes, precision) + CUDA_CONTEXT, 0
    while loading <= usable and rows < _MOST_ROWS:
        more = max(1, 2 * rows)
        if memory_of(sizes, precision, replace(work, rows=more)).total > usable:
            break
        rows = more
    return Way(wrapper, precision, one, loading, rows)


def planned(settings: Settings, device: str, processes: int, *, divided: bool) -> Memory:
    """Return what training takes of one process of a run, among all of which FSDP divides the base where `divided`.

    Raises:
        ModelError: when the model's dimensions are unknown.
    """
    memory_of = sharded_memory if divided else training_memory
    return memory_of(sizes_for(settings), settings.precision, workload_of(settings, device, processes))


def _whole_weight(sizes: Sizes, precision: Precision) -> int:
    """Return the bytes of the largest weight as it is read, and of a linear layer's 4 bits beside it."""
    largest = max(each.numel for each in sizes.weights)
    return max(2 * sizes.vocab_size * sizes.hidden_size, 2 * largest + precision.quantized * largest // 2)


def sharded_memory(sizes: Sizes, precision: Precision, work: Workload) -> Memory:
    """Return the memory of a process among which FSDP2 divides a run, when a training step needs the most.

    Gathered are two layers, since the next one's weights are under way while one computes, and what is in no layer: the
    output layer and the last norm. Accumulated gradients stay whole until the last micro-batch of a step.
    """
    step = Step(sizes, precision, replace(work, processes=1))
    trained, layers, processes = step.trained, sizes.num_hidden_layers, work.processes
    divided = divided_bytes(sizes, precision)
    parts: dict[str, Any] = {
        "base": divided // processes + base_bytes(sizes, precision) - divided,
        "adapter": 4 * trained // processes,
        "gradients": 4 * trained if work.accumulation > 1 else 4 * trained // processes + 4 * trained // layers,
        "optimizer": optimizer_bytes(work.optim, trained) // processes,
        "gathered": 2 * layer_bytes(sizes, precision, work) + root_bytes(sizes),
    }
    return max((replace(moment, **parts) for moment in moments(step)), key=lambda memory: memory.total)


def divided_bytes(sizes: Sizes, precision: Precision) -> int:
    """Return the bytes of the base that FSDP divides: all but the constants of 4-bit weights."""
    four_bit = precision.quant_type is not None
    stored = linear_parameters(sizes) // 2 if four_bit else 2 * linear_parameters(sizes)
    return stored + 2 * unquantized_parameters(sizes)


def layer_bytes(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Return the bytes that are gathered for a layer: its weights as stored, and its adapters in float32."""
    in_layers = divided_bytes(sizes, precision) - 2 * unquantized_parameters(sizes)
    return (in_layers + 4 * Step(sizes, precision, work).trained) // sizes.num_hidden_layers


def gathered_bytes(sizes: Sizes, precision: Precision, work: Workload) -> int:
    """Return the bytes that all all-gathers of a micro-batch give a process: layers and embedding twice, the rest once.

    Counted on two processes by `eval/collectives.py`.
    """
    embedding = 0 if sizes.tied_embeddings else 2 * sizes.vocab_size * sizes.hidden_size
    layers = sizes.num_hidden_layers * layer_bytes(sizes, precision, work)
    return 2 * (layers + embedding) + root_bytes(sizes)


def root_bytes(sizes: Sizes) -> int:
    """Return the bytes that are gathered throughout: what is in no layer, without an embedding of its own."""
    embedding = 0 if sizes.tied_embeddings else sizes.vocab_size * sizes.hidden_size
    return 2 * (unquantized_parameters(sizes) - embedding)


def spread(settings: Settings, work: Workload, gpu_gib: float) -> Iterator[Table | Text]:
    """Yield what to print of a workload on several GPUs: what each way takes, which one fits, and what launches it."""
    found = ways(sizes_for(settings), settings.precision, work, gpu_gib)
    yield _table(found, work.processes, gpu_gib)
    sizes = sizes_for(settings)
    gathers = {way.precision.name: gathered_bytes(sizes, way.precision, work) for way in found if way.wrapper == "FSDP"}
    said = ", ".join(f"{size / GIB:.2f} GiB in {name}" for name, size in gathers.items())
    reduced = found[0].training.adapter / GIB
    yield Text(f"Sent: by FSDP each micro-batch gathers {said}; by DDP and FSDP each step reduces {reduced:.2f} GiB.")
    fitting = sorted((way for way in found if way.rows), key=lambda way: way.precision != settings.precision)
    if not fitting:
        yield Text(
            f"Nothing fits {work.processes} GPUs of {gpu_gib:g} GiB: use more of them, or lower --max_length or --r."
        )
        return
    best, batch = fitting[0], work.rows * work.accumulation
    rows = max(size for size in range(1, min(best.rows, batch) + 1) if batch % size == 0)
    name = best.precision.name
    model = "" if settings.model == settings.spec.hub_id else f" --model {shlex.quote(settings.model)}"
    yield Text(f"It fits by {best.wrapper} in {name}. With {work.processes} times {batch} rows a step:")
    yield Text(
        f"accelerate launch --config_file {_LAUNCH[best.wrapper]} --num_processes {work.processes} recipes/"
        f"{settings.name}.py{model} --precision {name} --per_device_train_batch_size {rows} "
        f"--gradient_accumulation_steps {batch // rows}"
    )


def _table(found: Sequence[Way], processes: int, gpu_gib: float) -> Table:
    title = f"Each of {processes} GPUs, GiB, one row at a time, every layer checkpointed"
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1))
    for head in ("", "base", "gathered", "adapter", "step", "total", "loading", f"rows in {gpu_gib:g}"):
        table.add_column(Text(head), justify="right" if head else "left", no_wrap=True)
    for way in found:
        memory = way.training
        adapter = memory.adapter + memory.gradients + memory.optimizer
        step = memory.total - memory.base - memory.gathered - adapter
        parts = (memory.base, memory.gathered, adapter, step, memory.total, way.loading)
        figures = (f"{size / GIB:.2f}" for size in parts)
        table.add_row(*map(Text, (f"{way.wrapper} {way.precision.name}", *figures, str(way.rows or "none"))))
    return table
