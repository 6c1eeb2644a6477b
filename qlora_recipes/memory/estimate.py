"""How much memory a run needs, by part, from the dimensions of the model alone. Arithmetic: imports no torch.

A training step has a few moments at which memory can peak; the plan is the largest of them. What is added up, and from
which source, is in `step.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from qlora_recipes.errors import UsageError
from qlora_recipes.families.family import Sizes
from qlora_recipes.memory.sizes import sizes_for
from qlora_recipes.memory.step import Step, base_bytes
from qlora_recipes.memory.workload import Workload, workload_of
from qlora_recipes.precision import Precision
from qlora_recipes.settings import Settings

GIB = 2**30

CUDA_CONTEXT = 512 * 2**20
"""Bytes that a CUDA process takes in addition to its tensors: about 300 MB of driver and kernels since CUDA 11.7
loads them as needed (pytorch/pytorch issue 107667), and room for the kernels of training and for cuBLAS."""

EVALUATED_POSITIONS = 4096
"""Of one forward pass of an evaluation, padding included: enough to fill a GPU. A single row may be longer."""

ADAMW_BYTES = 8.0
OPTIMIZER_BYTES = {
    # Eight bits: a byte per moment, and a float32 scale per block of 256 (`bitsandbytes/optim/optimizer.py`).
    **dict.fromkeys(("lion_8bit", "rmsprop_bnb_8bit"), 1 + 4 / 256),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), 2 + 2 * 4 / 256),
    "ademamix_8bit": 3 + 3 * 4 / 256,
    "adamw_torch_4bit": 1 + 2 * 4 / 128,
    **dict.fromkeys(("lion_32bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "adagrad"), 4),
    **dict.fromkeys(("ademamix", "ademamix_32bit"), 12),
    "sgd": 0,
}
"""Optimizer to bytes of state for each trainable weight; any other counts as AdamW with two float32 moments.
A `paged_` one takes as much: its state moves to the host only when the GPU is full (arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment when memory peaks."""

    moment: str
    """When that is."""
    base: int = 0
    """The frozen model as stored, quantization constants included."""
    expanded: int = 0
    """Weights kept in 16 bits next to the stored ones."""
    adapter: int = 0
    """LoRA weights, float32 in every arm."""
    gradients: int = 0
    """Of the adapter, float32; with several processes also the buffers they exchange."""
    optimizer: int = 0
    activations: int = 0
    """What the forward pass keeps for the backward pass."""
    cache: int = 0
    """Keys and values of a generation."""
    logits: int = 0
    """The output layer and the loss."""
    workspace: int = 0
    """Dequantized weights and intermediate results of the layer at work."""
    heap: int = 0
    """On a CPU, what the C library holds next to tensors: holes between them, and memory freed but not returned."""
    gathered: int = 0
    """Weights that FSDP has gathered from the other processes for as long as they are used."""
    context: int = 0
    """The CUDA context, which `torch.cuda.max_memory_allocated` does not see."""

    @property
    def parts(self) -> dict[str, int]:
        """Name of each part to its bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Without the context: what PyTorch's allocator reports as its peak."""
        return self.total - self.context


@dataclass(frozen=True)
class MemoryPlan:
    """What one process of a run needs, for training and for evaluation."""

    precision: Precision
    training: Memory
    evaluation: Memory
    """Scoring or answering as many rows as evaluation takes at a time, with the adapter unmerged."""


def plan(
    settings: Settings, precision: Precision | None = None, *, device: str = "cuda", processes: int = 1
) -> MemoryPlan:
    """Return the memory of one process of a run, in the run's own precision or another.

    Raises:
        ModelError: when the model's dimensions are unknown.
    """
    sizes, storage = sizes_for(settings), precision or settings.precision
    work = workload_of(settings, device, processes)
    return MemoryPlan(storage, training_memory(sizes, storage, work), evaluation_memory(sizes, storage, work))


def optimizer_bytes(optim: str, parameters: int) -> int:
    """Return the bytes of an optimizer's state, by its `optim` name."""
    return round(OPTIMIZER_BYTES.get(optim.removeprefix("paged_"), ADAMW_BYTES) * parameters)


def training_memory(sizes: Sizes, precision: Precision, work: Workload) -> Memory:
    """Return the memory of the moment of a training step that needs the most."""
    step = Step(sizes, precision, work)
    peak = max(moments(step), key=lambda memory: memory.total)
    return replace(peak, heap=step.heap(peak.activations))


def _memory(step: Step, moment: str, **parts: int) -> Memory:
    """Return the memory of a moment, given what is not there at every moment."""
    context = CUDA_CONTEXT if step.work.device == "cuda" else 0
    return Memory(moment, base_bytes(step.sizes, step.precision), adapter=4 * step.trained, context=context, **parts)


def moments(step: Step) -> Iterator[Memory]:
    """Yield the memory of every moment at which a training step can peak."""
    optimizer = optimizer_bytes(step.work.optim, step.trained)
    layers, every = step.sizes.num_hidden_layers, step.work.checkpoint_every
    # A second copy in the buckets that DistributedDataParallel sends: `gradient_as_bucket_view` is off.
    gradients = 4 * step.trained * (2 if step.work.processes > 1 else 1)
    full, boundary, shared = step.layer_kept, step.layer_boundary, step.shared_kept
    checkpointed = len(range(0, layers, every)) if every else 0  # Transformers counts from layer 0
    kept = checkpointed * boundary + (layers - checkpointed) * full + shared
    last = step.layer_again if every and (layers - 1) % every == 0 else 0
    first = (step.layer_again if every else full) + boundary
    held = gradients if step.work.accumulation > 1 else 0
    # Autocast keeps its 16-bit copies of PEFT's weights until the forward pass ends.
    copies = 2 * step.trained if every and not step.fused else 0
    forward, backward = step.head_workspace
    # With one micro-batch a step the gradients come one by one, those of the first layer last.
    before_first = max(held, gradients - gradients // layers)
    for moment, sums, activations, parts in (
        ("output layer, forward", held, kept + copies, {"logits": forward}),
        ("output layer, backward", held, kept, {"logits": backward}),
        ("last layer", held, kept + last, {"workspace": step.layer_workspace}),
        ("first layer", before_first, first + shared, {"workspace": step.layer_workspace}),
    ):
        always = {"expanded": step.expanded, "optimizer": optimizer, "gradients": sums, "activations": activations}
        yield _memory(step, moment, **always, **parts)


def evaluation_memory(sizes: Sizes, precision: Precision, work: Workload) -> Memory:
    """Return the memory of scoring or answering rows of EVALUATED_POSITIONS or one that is longer: the larger of both.

    Scoring makes all logits in 16 bits and their log-softmax in float32 (lm-eval, `models/huggingface.py`),
    which a CPU casts first; answering keeps keys and values of every layer in 16 bits, and needs the logits
    of one position of each row.
    """
    rows = max(1, EVALUATED_POSITIONS // work.length)
    step = Step(sizes, precision, replace(work, rows=rows, packing=False))
    logits = (2 + (4 if work.device == "cuda" else 4 + 4)) * sizes.vocab_size
    scoring = _memory(step, "scoring", logits=logits * max(EVALUATED_POSITIONS, work.length))
    cache = 2 * 2 * rows * sizes.cached_positions(work.length) * sizes.key_value_size
    answering = _memory(step, "answering", cache=cache, logits=rows * logits, workspace=step.forward_workspace)
    return max(scoring, answering, key=lambda memory: memory.total)


def largest_micro_batch(sizes: Sizes, precision: Precision, work: Workload, gpu_gib: float) -> int:
    """Return how many rows of full length fit a GPU of that many GiB in one micro-batch; 0 if not even one does.

    Memory that the allocator loses to fragments is not counted; leave a tenth of the GPU free for it.

    Raises:
        UsageError: for a size that no GPU has.
    """
    if not 0 < gpu_gib < math.inf:
        raise UsageError(f"--gpu {gpu_gib:g}: expected the memory of a GPU in GiB, such as 24")

    def fits(rows: int) -> bool:
        return training_memory(sizes, precision, replace(work, rows=rows)).total <= gpu_gib * GIB

    most = 1
    while fits(most):
        most *= 2
    return bisect_left(range(most), True, lo=most // 2 + 1, key=lambda rows: not fits(rows)) - 1
